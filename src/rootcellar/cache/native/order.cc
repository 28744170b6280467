#include "order.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <numeric>
#include <tuple>
#include <utility>

#include "adaptive.h"
#include "tree.h"

namespace rootcellar {

namespace {
constexpr std::size_t ARITY = 4;  // fewer levels than a binary heap, and siblings lie together in memory
constexpr int DAMAGES = 5;
}  // namespace

// ---- one heap ----------------------------------------------------------------------------------------------------

void Heap::put(std::size_t position, const Item& item) {
    items_[position] = item;
    positions_[item.ticket] = static_cast<std::int32_t>(position);
}

void Heap::up(std::size_t hole, const Item& item) {
    while (hole > 0) {
        const std::size_t above = (hole - 1) / ARITY;
        if (!(item.rank < items_[above].rank)) break;
        put(hole, items_[above]);
        hole = above;
    }
    put(hole, item);
}

void Heap::down(std::size_t hole, const Item& item) {
    const std::size_t count = items_.size();
    while (true) {
        const std::size_t first = hole * ARITY + 1;
        if (first >= count) break;
        const std::size_t last = std::min(first + ARITY, count);
        std::size_t least = first;
        for (std::size_t i = first + 1; i < last; ++i)
            if (items_[i].rank < items_[least].rank) least = i;
        if (!(items_[least].rank < item.rank)) break;
        put(hole, items_[least]);
        hole = least;
    }
    put(hole, item);
}

void Heap::push(const Rank& rank, Node* node, std::int32_t heap) {
    Item item{rank, node, free_};
    if (free_ >= 0) {
        free_ = positions_[free_];
    } else {
        item.ticket = static_cast<std::int32_t>(positions_.size());
        positions_.push_back(-1);
    }
    item.entry().filed = item.ticket;
    item.entry().heap = heap;
    items_.push_back(item);
    up(items_.size() - 1, item);
}

void Heap::remove(std::int32_t ticket) {
    const auto position = static_cast<std::size_t>(positions_[ticket]);
    const Item gone = items_[position];
    const Item last = items_.back();
    items_.pop_back();
    gone.entry().filed = -1;
    positions_[ticket] = std::exchange(free_, ticket);
    if (position == items_.size()) return;
    if (last.rank < gone.rank)
        up(position, last);
    else
        down(position, last);
}

Item Heap::pop() {
    const Item least = items_.front();
    remove(least.ticket);
    // What leaves next was not touched for long: fetch it while this one goes.
    if (!items_.empty())
        for (std::size_t at = 0; at < sizeof(Node) + sizeof(Entry); at += 64)
            __builtin_prefetch(reinterpret_cast<const std::byte*>(items_.front().node) + at);
    return least;
}

void Heap::refile(std::int32_t ticket, const Rank& rank) {
    const auto position = static_cast<std::size_t>(positions_[ticket]);
    Item item = items_[position];
    const bool smaller = rank < item.rank;
    item.rank = rank;
    if (smaller)
        up(position, item);
    else
        down(position, item);
}

// ---- what both orders share --------------------------------------------------------------------------------------

Item Order::pop(Tree& tree) {
    Item least;
    while (take(least)) {
        const Shelf& shelf = tree.shelves[least.rank.shelf];
        const Entry& entry = least.entry();
        if (entry.evictable == 0 || (shelf.full() && entry.kids != 0)) continue;
        const Rank rank = tree.rank(least.node, shelf);
        if (rank == least.rank) return least;
        push(least.node, rank);
    }
    return Item{{}, nullptr};
}

// ---- fixed policies ----------------------------------------------------------------------------------------------

void FixedOrder::push(Node* node, const Rank& rank) {
    const Entry& entry = node->entry(rank.shelf);
    if (entry.filed < 0)
        heap_.push(rank, node, 0);
    else if (heap_.rank(entry.filed) != rank)
        heap_.refile(entry.filed, rank);
}

void FixedOrder::forget(Entry& entry) {
    if (entry.filed >= 0) heap_.remove(entry.filed);
}

const Rank* FixedOrder::filed(const Entry& entry) const {
    return entry.filed < 0 ? nullptr : &heap_.rank(entry.filed);
}

bool FixedOrder::take(Item& least) {
    if (heap_.empty()) return false;
    least = heap_.pop();
    return true;
}

// ---- the adaptive policy -----------------------------------------------------------------------------------------

LearnedOrder::LearnedOrder(const Shadow& shadow)
    : shadow_(shadow),
      heaps_(DAMAGES * CLASSES * BUCKETS),
      by_place_(heaps_.size()),
      places_(heaps_.size()),
      filled_((heaps_.size() + 63) / 64) {
    sort();
}

double LearnedOrder::worth(int heap) const {
    return shadow_.worth[heap / BUCKETS % CLASSES][heap % BUCKETS];
}

void LearnedOrder::mark(int heap) {
    filled_[places_[heap] / 64] |= std::uint64_t{1} << (places_[heap] % 64);
}

void LearnedOrder::sort() {
    fits_ = shadow_.fits;
    std::iota(by_place_.begin(), by_place_.end(), 0);
    std::sort(by_place_.begin(), by_place_.end(), [this](int one, int other) {
        return std::tuple(one / BUCKETS / CLASSES, worth(one), one) <
               std::tuple(other / BUCKETS / CLASSES, worth(other), other);
    });
    std::fill(filled_.begin(), filled_.end(), 0);
    for (std::size_t place = 0; place < by_place_.size(); ++place) {
        places_[by_place_[place]] = static_cast<std::int32_t>(place);
        if (!heaps_[by_place_[place]].empty()) mark(by_place_[place]);
    }
}

void LearnedOrder::push(Node* node, const Rank& rank) {
    const Entry& entry = node->entry(rank.shelf);
    if (entry.filed >= 0) {
        if (heaps_[entry.heap].rank(entry.filed) == rank) return;
        heaps_[entry.heap].remove(entry.filed);
    }
    file(rank, node);
}

void LearnedOrder::file(const Rank& rank, Node* node) {
    const bool awaited = rank.damage >= AWAITED;  // in one heap, in the order of when
    const int bucket = awaited ? 0 : shadow_.bucket(shadow_.volume - rank.second);
    const std::int64_t group = awaited ? 0 : rank.first;
    const auto heap = static_cast<std::int32_t>((rank.damage * CLASSES + group) * BUCKETS + bucket);
    heaps_[heap].push(rank, node, heap);
    mark(heap);
}

void LearnedOrder::forget(Entry& entry) {
    if (entry.filed >= 0) heaps_[entry.heap].remove(entry.filed);
}

const Rank* LearnedOrder::filed(const Entry& entry) const {
    return entry.filed < 0 ? nullptr : &heaps_[entry.heap].rank(entry.filed);
}

std::size_t LearnedOrder::bytes() const {
    std::size_t sum = heaps_.size() * (sizeof(Heap) + 2 * sizeof(std::int32_t));
    for (const Heap& heap : heaps_) sum += heap.bytes();
    return sum;
}

template <class Visit>
void LearnedOrder::each_heap(Visit visit) {
    for (std::size_t word = 0; word < filled_.size(); ++word) {
        for (std::uint64_t bits = filled_[word]; bits != 0; bits &= bits - 1) {
            const std::size_t place = word * 64 + std::countr_zero(bits);
            const int index = by_place_[place];
            if (heaps_[index].empty())
                filled_[word] &= ~(std::uint64_t{1} << (place % 64));
            else if (!visit(index, heaps_[index]))
                return;
        }
    }
}

void LearnedOrder::age() {
    moved_ = shadow_.volume;
    if (fits_ != shadow_.fits) sort();
    each_heap([this](int index, Heap& heap) {
        if (index / BUCKETS / CLASSES >= AWAITED) return false;  // they are last
        while (!heap.empty() && shadow_.bucket(moved_ - heap.least().rank.second) != index % BUCKETS) {
            const Item item = heap.pop();
            file(item.rank, item.node);
        }
        return true;
    });
}

bool LearnedOrder::take(Item& least) {
    if (moved_ != shadow_.volume || fits_ != shadow_.fits) age();
    Heap* best = nullptr;
    std::tuple<int, double> value;
    std::tuple<std::int64_t, std::int64_t, int> rank;
    each_heap([&](int index, Heap& heap) {
        const std::tuple<int, double> its{index / BUCKETS / CLASSES, worth(index)};
        if (best != nullptr && its != value) return false;
        const Rank& head = heap.least().rank;
        const std::tuple<std::int64_t, std::int64_t, int> other{head.second, head.id, head.shelf};
        if (best == nullptr || other < rank) {
            best = &heap;
            value = its;
            rank = other;
        }
        return true;
    });
    if (best == nullptr) return false;
    least = best->pop();
    return true;
}

}  // namespace rootcellar
