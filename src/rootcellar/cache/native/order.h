// The order in which entries leave an arena: heaps of what may leave, under the keys at which they were filed.
//
// order.py and adaptive.py say why a key may be filed once and corrected when it comes up. Here an entry knows its
// place in its heap, so an item that died is taken out at once; what comes up, and when, is the same.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <vector>

#include "node.h"

namespace rootcellar {

struct Tree;
class Shadow;

// Where an entry stands: the least leaves first.
struct Rank {
    std::int64_t damage, first, second, id;
    int shelf;
    auto operator<=>(const Rank&) const = default;
};

struct Item {
    Rank rank;
    Node* node;

    Entry& entry() const { return node->entry(rank.shelf); }
};

// A heap of items, each of which knows its position. O(log n) for everything.
class Heap {
  public:
    bool empty() const { return items_.empty(); }
    const Item& least() const { return items_.front(); }
    const Item& at(std::int32_t position) const { return items_[position]; }
    void push(const Item& item, std::int32_t heap);
    void remove(std::int32_t position);
    void refile(std::int32_t position, const Rank& rank);
    std::size_t bytes() const { return items_.capacity() * sizeof(Item); }

  private:
    void up(std::size_t hole, const Item& item);
    void down(std::size_t hole, const Item& item);
    void put(std::size_t position, const Item& item);

    std::vector<Item> items_;
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
    void file(const Item& item);
    void age();
    template <class Visit>
    void each_heap(Visit visit);

    const Shadow& shadow_;
    std::vector<Heap> heaps_;
    std::vector<std::uint64_t> filled_;  // a bit per heap: it may hold something
    std::int64_t moved_ = -1;            // volume at which the heads were last moved on
};

}  // namespace rootcellar
