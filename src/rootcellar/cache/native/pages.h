// Page numbers in few words. Pages that are taken together mostly count up by one, so lists of them are kept as spans
// of consecutive numbers: a prompt's thousands of pages cost a few words, however they are cut, copied or given back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "run.h"

namespace rootcellar {

// Write `first`, `first + 1`, ...: `count` numbers.
void count_up_many(std::int32_t* into, std::int32_t first, std::int64_t count);
inline void count_up(std::int32_t* into, std::int32_t first, std::int64_t count) {
    if (count >= 32) return count_up_many(into, first, count);
    for (std::int64_t i = 0; i < count; ++i) into[i] = first + static_cast<std::int32_t>(i);
}

// How many of the pages count up by one from the first of them; at least 1. The work is in proportion to the answer.
std::int32_t consecutive_of_many(const std::int32_t* pages, std::int32_t count);
inline std::int32_t consecutive(const std::int32_t* pages, std::int32_t count) {
    const std::int32_t few = std::min(count, 16);
    std::int32_t i = 1;
    while (i < few && pages[i] == pages[0] + i) ++i;
    return i < 16 ? i : consecutive_of_many(pages, count);
}

// A list of pages. Parts of it share its memory.
class Pages {
  public:
    Pages() = default;
    Pages(Ledger& ledger, const std::int32_t* from, std::int32_t count) : count_(count) {
        const std::int32_t first = count == 0 ? 0 : consecutive(from, count);
        if (first == count) {
            if (count != 0) origin_ = from[0];
            return;
        }
        std::vector<Span> spans = {{first, from[first - 1]}};
        for (std::int32_t at = first, next; at < count; at = next) {
            next = at + consecutive(from + at, count - at);
            spans.push_back({next, from[next - 1]});
        }
        spans_ = Run<Span>(ledger, spans.data(), static_cast<std::uint32_t>(spans.size()));
    }
    Pages(Pages&& other) noexcept
        : spans_(std::move(other.spans_)), origin_(other.origin_), count_(std::exchange(other.count_, 0)) {}
    Pages& operator=(Pages&& other) noexcept {
        spans_ = std::move(other.spans_);
        origin_ = other.origin_;
        count_ = other.count_;
        other.clear();
        return *this;
    }

    void clear() {
        spans_.clear();
        count_ = 0;
    }

    std::int32_t size() const { return count_; }
    bool empty() const { return count_ == 0; }
    std::int32_t front() const {
        std::int32_t first = 0;
        each(0, 1, [&](std::int32_t page, std::int32_t) { first = page; });
        return first;
    }

    // `visit(first, count)` for the spans of elements [begin, end), in order.
    template <class Visit>
    void each(std::int32_t begin, std::int32_t end, Visit visit) const {
        if (begin >= end) return;
        if (spans_.empty()) {
            visit(origin_ + begin, end - begin);
            return;
        }
        const std::int32_t from = origin_ + begin, to = origin_ + end;
        const Span* last = spans_.data() + spans_.size();
        const Span* span = std::upper_bound(spans_.data(), last, from,
                                            [](std::int32_t element, const Span& one) { return element < one.end; });
        std::int32_t at = from;
        for (; at < to; at = span++->end) visit(span->page(at), std::min(span->end, to) - at);
    }

    // The same from the last span to the first.
    template <class Visit>
    void each_back(Visit visit) const {
        if (count_ == 0) return;
        if (spans_.empty()) {
            visit(origin_, count_);
            return;
        }
        std::int32_t to = origin_ + count_;
        for (auto i = static_cast<std::int32_t>(spans_.size()) - 1; i >= 0; --i) {
            const std::int32_t from = std::max(i == 0 ? origin_ : spans_[i - 1].end, origin_);
            visit(spans_[i].page(from), to - from);
            to = from;
        }
    }

    // Elements [begin, end) one by one.
    void copy(std::int32_t begin, std::int32_t end, std::int32_t* into) const {
        each(begin, end, [&](std::int32_t first, std::int32_t count) {
            count_up(into, first, count);
            into += count;
        });
    }
    std::vector<std::int32_t> all(std::int32_t begin = 0) const {
        std::vector<std::int32_t> pages(count_ - begin);
        copy(begin, count_, pages.data());
        return pages;
    }

    // Elements [begin, end) as a list of their own.
    Pages part(std::int32_t begin, std::int32_t end) const {
        Pages result;
        if (begin >= end) return result;
        result.count_ = end - begin;
        result.origin_ = origin_ + begin;
        if (spans_.empty()) return result;
        const auto ends_after = [](std::int32_t element, const Span& one) { return element < one.end; };
        const Span* first = std::upper_bound(spans_.data(), spans_.data() + spans_.size(), origin_ + begin, ends_after);
        const Span* last = std::upper_bound(first, spans_.data() + spans_.size(), origin_ + end - 1, ends_after);
        if (first == last)
            result.origin_ = first->page(origin_ + begin);
        else
            result.spans_ = spans_.part(static_cast<std::uint32_t>(first - spans_.data()),
                                        static_cast<std::uint32_t>(last + 1 - spans_.data()));
        return result;
    }

    void append(Ledger& ledger, const std::int32_t* from, std::int32_t count) {
        while (count > 0) {
            const std::int32_t taken = consecutive(from, count);
            add(ledger, *from, taken);
            from += taken;
            count -= taken;
        }
    }

    void prepend(Ledger& ledger, const std::int32_t* from, std::int32_t count) {
        Pages whole(ledger, from, count);
        each(0, count_, [&](std::int32_t first, std::int32_t its_count) { whole.add(ledger, first, its_count); });
        *this = std::move(whole);
    }

  private:
    // Elements up to `end` of the numbering that a list shares with its parts; the last of them is page `last`.
    struct Span {
        std::int32_t end, last;
        std::int32_t page(std::int32_t element) const { return last - (end - 1 - element); }
    };

    void add(Ledger& ledger, std::int32_t first, std::int32_t count) {
        if (count_ == 0) origin_ = first;
        if (spans_.empty()) {
            if (origin_ + count_ == first) {
                count_ += count;
                return;
            }
            const Span one{count_, origin_ + count_ - 1};
            spans_.append(ledger, &one, 1);
            origin_ = 0;
        }
        const std::int32_t end = origin_ + count_;
        Span* last = spans_.own_last();
        const std::int32_t beyond = spans_[spans_.size() - 1].end - end;
        if (beyond != 0) {  // the last span goes on in a part that was cut off
            if (last == nullptr) {
                spans_ = Run<Span>(ledger, spans_.data(), spans_.size());
                last = spans_.own_last();
            }
            *last = {end, last->last - beyond};
        }
        count_ += count;
        const Span next{end + count, first + count - 1};
        if (last != nullptr && last->last + 1 == first)
            *last = next;
        else
            spans_.append(ledger, &next, 1);
    }

    Run<Span> spans_;          // none: the list is one span
    std::int32_t origin_ = 0;  // number of the first element; where there are no spans, the first page
    std::int32_t count_ = 0;
};

}  // namespace rootcellar
