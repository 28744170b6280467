// The order in which entries leave an arena: heaps of what may leave, under the keys at which they were filed.
//
// order.py and adaptive.py say why a key may be filed once and corrected when it comes up. Here an entry knows its
// place in its heap, so an item that died is taken out at once; what comes up, and when, is the same.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "node.h"

namespace rootcellar {

struct Tree;
class Shadow;

// The damages of what is known to be asked for again, some time or by a request that waits already.
constexpr std::int32_t AWAITED = 3, QUEUED = 4;
constexpr std::int64_t NEVER = -1, LATEST = (std::int64_t{1} << 31) - 1;

// Where an entry stands: the least leaves first.
struct Rank {
    std::int32_t damage;
    std::int32_t shelf;
    std::int64_t first, second, id;

    bool operator==(const Rank&) const = default;
    bool operator<(const Rank& other) const {
        if (damage != other.damage) return damage < other.damage;
        if (first != other.first) return first < other.first;
        if (second != other.second) return second < other.second;
        return id != other.id ? id < other.id : shelf < other.shelf;
    }
};

struct Item {
    Rank rank;
    Node* node;
    std::int32_t ticket = -1;

    Entry& entry() const { return node->entry(rank.shelf); }
};

// A heap of items. O(log n) for everything.
//
// An entry knows its item by a ticket. Where the item of a ticket stands is kept in an array of its own, because items
// move at every step of every operation and the entries lie all over the memory.
class Heap {
  public:
    bool empty() const { return items_.empty(); }
    const Item& least() const { return items_.front(); }
    const Rank& rank(std::int32_t ticket) const { return items_[positions_[ticket]].rank; }
    void push(const Rank& rank, Node* node, std::int32_t heap);
    void remove(std::int32_t ticket);
    Item pop();
    void refile(std::int32_t ticket, const Rank& rank);
    std::size_t bytes() const {
        return items_.capacity() * sizeof(Item) + positions_.capacity() * sizeof(std::int32_t);
    }

  private:
    void up(std::size_t hole, const Item& item);
    void down(std::size_t hole, const Item& item);
    void put(std::size_t position, const Item& item);

    std::vector<Item> items_;
    std::vector<std::int32_t> positions_;  // by ticket; of a free ticket: the next free one, -1 at the end
    std::int32_t free_ = -1;
};

class Order {
  public:
    virtual ~Order() = default;
    // File an entry, in place of where it was filed before.
    virtual void push(Node* node, const Rank& rank) = 0;
    // The entry left its shelf.
    virtual void forget(Entry& entry) = 0;
    // The rank an entry is filed under; null when it is not.
    virtual const Rank* filed(const Entry& entry) const = 0;
    virtual std::size_t bytes() const = 0;
    // The entry that should leave next, no longer filed; its node is null when nothing may leave.
    Item pop(Tree& tree);

  protected:
    virtual bool take(Item& least) = 0;
};

// Any fixed policy.
class FixedOrder final : public Order {
  public:
    void push(Node* node, const Rank& rank) override;
    void forget(Entry& entry) override;
    const Rank* filed(const Entry& entry) const override;
    std::size_t bytes() const override { return heap_.bytes(); }

  protected:
    bool take(Item& least) override;

  private:
    Heap heap_;
};

// The adaptive policy: a heap per damage, class and age bucket; the head that is worth least leaves.
//
// Heaps stand in the order of what they are worth, which changes only when the shadow learns: the first that is not empty
// has the head that leaves, or one of those that are worth the same.
class LearnedOrder final : public Order {
  public:
    explicit LearnedOrder(const Shadow& shadow);
    void push(Node* node, const Rank& rank) override;
    void forget(Entry& entry) override;
    const Rank* filed(const Entry& entry) const override;
    std::size_t bytes() const override;

  protected:
    bool take(Item& least) override;

  private:
    void file(const Rank& rank, Node* node);
    void sort();
    void age();
    double worth(int heap) const;
    void mark(int heap);
    // Heaps that hold something, by worth, until `visit` says that it has seen enough.
    template <class Visit>
    void each_heap(Visit visit);

    const Shadow& shadow_;
    std::vector<Heap> heaps_;
    std::vector<std::int32_t> by_place_, places_;  // the heap at each place of the order, the place of each heap
    std::vector<std::uint64_t> filled_;            // a bit per place: the heap there may hold something
    std::int64_t fits_ = 0;                        // of the shadow, when the order was made
    std::int64_t moved_ = -1;                      // volume at which the heads were last moved on
};

}  // namespace rootcellar
