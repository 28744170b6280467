// Who begins with this page below that node: one open-addressing table for all nodes of a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hash.h"
#include "node.h"

namespace rootcellar {

class Children {
  public:
    explicit Children(std::int64_t page_size) : page_size_(page_size), table_(64) {}

    // What a child of `parent` whose edge begins with `page` is filed under.
    std::uint64_t hash(const Node* parent, const std::int64_t* page) const {
        return hash_of(parent->id, page, page_size_ * sizeof *page);
    }

    Node* find(const Node* parent, const std::int64_t* page) const { return find(parent, page, hash(parent, page)); }

    Node* find(const Node* parent, const std::int64_t* page, std::uint64_t hash) const {
        for (std::size_t at = hash & mask(); table_[at].node != nullptr; at = (at + 1) & mask()) {
            Node* node = table_[at].node;
            if (table_[at].hash == hash && node->parent == parent &&
                std::memcmp(node->tokens.data(), page, page_size_ * sizeof *page) == 0)
                return node;
        }
        return nullptr;
    }

    // File a node under its `hash`.
    void add(Node* node) {
        if (4 * (count_ + 1) > 3 * table_.size()) grow();
        ++count_;
        place(node);
    }

    // Put `heir` where `node` is filed: both begin with the same page below the same parent.
    void replace(const Node* node, Node* heir) { table_[slot_of(node)].node = heir; }

    void remove(const Node* node) {
        std::size_t hole = slot_of(node);
        --count_;
        // Close the gap: whatever was pushed past it moves back.
        for (std::size_t at = (hole + 1) & mask(); table_[at].node != nullptr; at = (at + 1) & mask()) {
            const std::size_t home = table_[at].hash & mask();
            if (((at - home) & mask()) >= ((at - hole) & mask())) {
                table_[hole] = table_[at];
                hole = at;
            }
        }
        table_[hole] = {};
    }

    std::size_t bytes() const { return table_.capacity() * sizeof(Slot); }

  private:
    struct Slot {
        std::uint64_t hash = 0;
        Node* node = nullptr;
    };

    std::size_t mask() const { return table_.size() - 1; }

    std::size_t slot_of(const Node* node) const {
        std::size_t at = node->hash & mask();
        while (table_[at].node != node) at = (at + 1) & mask();
        return at;
    }

    void place(Node* node) {
        std::size_t at = node->hash & mask();
        while (table_[at].node != nullptr) at = (at + 1) & mask();
        table_[at] = {node->hash, node};
    }

    void grow() {
        const std::vector<Slot> old = std::exchange(table_, std::vector<Slot>(2 * table_.size()));
        for (const Slot& slot : old)
            if (slot.node != nullptr) place(slot.node);
    }

    std::int64_t page_size_;
    std::size_t count_ = 0;
    std::vector<Slot> table_;
};

}  // namespace rootcellar
