// The twin of slots.py: which pages of an arena are free.
#include "tree.h"

#include <algorithm>

namespace rootcellar {

Slots::Slots(std::int32_t pages) : pages_(pages), free_(0) {
    if (pages > 0) push(1, pages);
}

void Slots::must_hold(std::int32_t count) const {
    if (count > free_) broken("more pages are taken than are free");
}

void Slots::too_many() {
    broken("more pages are given back than were taken");
}

void Slots::take(std::int32_t* into, std::int32_t count) {
    must_hold(count);
    free_ -= count;
    while (count > 0) {
        Span& top = stack_.back();
        const std::int32_t taken = std::min(top.count, count);
        count_up(into, top.first, taken);
        into += taken;
        count -= taken;
        top = {top.first + taken, top.count - taken};
        if (top.count == 0) stack_.pop_back();
    }
}

std::int32_t Slots::take_one() {
    must_hold(1);
    --free_;
    Span& top = stack_.back();
    const std::int32_t page = top.first++;
    if (--top.count == 0) stack_.pop_back();
    return page;
}

void Slots::give_many(const std::int32_t* pages, std::int32_t count) {
    given_.clear();
    while (count > 0) {
        const std::int32_t given = consecutive(pages, count);
        given_.push_back({*pages, given});
        pages += given;
        count -= given;
    }
    for (auto span = given_.rbegin(); span != given_.rend(); ++span) push(span->first, span->count);
}

void Slots::give(const Pages& pages) {
    must_lack(pages.size());
    pages.each_back([this](std::int32_t first, std::int32_t count) { push(first, count); });
}

std::vector<std::int32_t> Slots::free_list() const {
    std::vector<std::int32_t> pages(free_);
    std::int32_t* into = pages.data();
    for (auto span = stack_.rbegin(); span != stack_.rend(); into += span->count, ++span)
        count_up(into, span->first, span->count);
    return pages;
}

Arena::Arena(std::string its_name, std::int32_t pages, std::unique_ptr<Order> its_order)
    : slots(pages), order(std::move(its_order)), name(std::move(its_name)) {}
Arena::~Arena() = default;

}  // namespace rootcellar
