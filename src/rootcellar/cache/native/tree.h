// The radix tree: where nodes hang, what they hold, and what keeps an entry from leaving. The twin of tree.py.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "adaptive.h"
#include "children.h"
#include "journal.h"
#include "node.h"
#include "order.h"
#include "settings.h"

namespace rootcellar {

// How far a key is cached; valid for its path while `version` is the tree's.
struct Hit {
    const void* tree = nullptr;  // whose nodes the path names
    std::int64_t version = -1;
    std::int64_t reaches[TIERS] = {};  // tokens
    std::int64_t branch = 0;           // tokens
    std::vector<Node*> path;
};

// An internal promise is broken; the caller's call cannot be served.
[[noreturn]] void broken(const std::string& what);

// A call that cannot be served: which of words.py says so, and what it is told.
struct Refusal {
    using Value = std::variant<std::int64_t, std::string, const Lease*>;
    const char* word;
    std::vector<Value> values;
};

struct ShelfSize {
    int k;
    Tier tier;
    int arena;  // shelves with the same number share it
};

// What follows from the settings, worked out by the twin.
struct Sizes {
    std::vector<ShelfSize> shelves;
    std::vector<std::pair<std::string, std::int32_t>> arenas;  // name and pages of each
    Edges edges{};
};

// Pages wanted of some shelves.
using Needs = std::vector<std::pair<Shelf*, std::int64_t>>;

struct Tree {
    Tree(const Settings& settings, const Sizes& sizes);
    ~Tree();
    Tree(const Tree&) = delete;
    Tree& operator=(const Tree&) = delete;

    // structure
    Node* root(const Ref<Name>& name);
    Node* add(Node* parent, const std::int64_t* tokens, std::int32_t size, Lender* lender = nullptr);
    std::int32_t common(const Node* node, const std::int64_t* tokens, std::int64_t limit) const;
    // `leaving`: the lower part is about to be thrown away.
    Node* split(Node* node, std::int32_t at, bool leaving = false);
    // Throw away a node that nothing needs, and those above that nothing needs then.
    void discard(Node* node) {
        if (!node->held() && node->first_child == nullptr) discard_way(node);
    }
    // Free what was thrown away: at the end of a verb, when nothing points to it any more.
    void bury() {
        if (!graveyard_.empty() || !ledger.returned.empty()) bury_all();
    }
    Ref<Name> name(std::string_view text);

    // entries
    void attach(Node* node, Shelf& shelf, const std::int32_t* pages, std::int32_t count, std::int32_t lo);
    void extend(Node* node, const std::int64_t* tokens, std::int32_t size,
                const std::vector<const std::int32_t*>& pages, bool lasting);
    Pages detach(Node* node, Shelf& shelf, std::int32_t count);
    bool holds_any(Node* node, int k) const;
    bool keeps(const Node* node, const Shelf& shelf) const;
    bool dead(Node* node) const;
    void refresh(Node* node, Shelf& shelf);
    std::int32_t unpinned(Node* node, const Shelf& shelf, const Entry& entry) const;

    // holds and pins
    // `far`: the device may still evict what it has.
    void hold(Node* node, bool far = false);
    void release(Node* node, bool far = false);
    void pin(Node* node, int k, std::int64_t start, std::int32_t count);
    void use(Node* node, const std::vector<std::int64_t>& starts) {
        if (node->parent != nullptr) use_way(node, starts);
    }

    // When a kind of a node is wanted again, NEVER, or 0: nobody knows.
    void expect(Node* node, int k, std::int32_t due);
    // Note that a node has a turn.
    void enqueue(Node* node);

    // the order of leaving
    Rank rank(Node* node, const Shelf& shelf);
    int damage(Node* node, const Shelf& shelf) const;
    int bare_damage(Node* node, const Shelf& shelf) const;  // whatever is expected
    std::int64_t reach(int k, std::int64_t page) const;
    bool ends_well(Node* node) const;
    void restage(Node* node);
    void requeue(Node* node, Shelf& shelf);

    // match.cc
    void find(const Key& key, Hit& hit);
    Node* place_of(const Hit& hit, const Ref<Name>& name, std::int64_t pages);
    void touch(const Hit& hit);

    // evict.cc
    bool make_room(Arena& arena, std::int64_t pages);
    // For so many pages of each of some shelves at once; evicts all or nothing.
    bool make_room_for(const Needs& needs);
    bool fits(const Needs& needs);  // whether it would succeed
    void forget_entry(Shelf& shelf, Node* node);
    void prune(Node* node);
    void drop_subtree(Node* top);

    const Digest* page_digests(Node* node);
    // Of the page before one on the way to a node; of a key's first page the namespace's.
    const Digest& digest_before(const Node* node, std::int32_t page) const;
    // Positions and lengths in tokens, in pages: whether a page begins there, which has it, how many it takes.
    bool begins_page(std::int64_t at) const { return shift_ >= 0 ? (at & (page_size - 1)) == 0 : at % page_size == 0; }
    std::int64_t page_at(std::int64_t at) const { return shift_ >= 0 ? at >> shift_ : at / page_size; }
    std::int64_t pages_of(std::int64_t tokens) const { return page_at(tokens + page_size - 1); }
    std::int64_t start_page(int k, std::int64_t tokens) const { return page_at(kinds[k].start(tokens)); }
    Shelf* shelf(Tier tier, int k) const { return by_tier[tier][k]; }
    bool is_fresh(const Hit& hit) const { return hit.tree == this && hit.version == version; }
    const Digest& seed(Name& name) const;  // the parent of a namespace's first pages
    std::size_t node_bytes() const { return stride_; }
    std::size_t bytes() const;

    Ledger ledger;
    const Settings given;
    const std::vector<Kind> kinds = given.kinds;
    const std::int64_t page_size = given.page_size;
    std::unique_ptr<Shadow> shadow;
    std::unique_ptr<Journal> journal;
    Evictions evictions;
    std::int64_t least_shared = 0;             // tokens of an edge that may refer to its key's memory
    std::function<void(Node*, Shelf&)> spill;  // told of an entry about to be evicted (write-back)
    std::int64_t tick = 0;
    std::int64_t version = 0;  // counts structural changes: a hit is fresh while it has not moved
    std::int64_t nodes = 0;
    std::int64_t last_id = 0;
    std::vector<std::unique_ptr<Arena>> arenas;
    std::deque<Shelf> shelves;
    std::vector<Tier> tiers;
    std::vector<Shelf*> by_tier[TIERS];
    std::vector<Shelf*> full_shelves, window_shelves;
    std::vector<int> windows;  // kinds that are not full attention
    std::vector<std::int64_t> resets;
    Node* first_root = nullptr;  // listed roots, in the order in which they came
    Node* last_root = nullptr;
    std::vector<Node*> detached;
    std::vector<Node*> queued;  // nodes that have a turn; null: one that was thrown away

  private:
    Run<std::int64_t> edge(const std::int64_t* tokens, std::int64_t count, Lender* lender);
    Node* blank(Node* parent, Run<std::int64_t> tokens, std::int32_t start, std::int32_t size);
    void split_entries(Node* parent, Node* upper, Node* lower, std::int32_t at);
    void forget_root(Node* root);
    void requeue_states(Node* node);
    void drop_tail(Shelf& shelf, Node* node, std::int64_t pages);
    void drop_head(Shelf& shelf, Node* node, std::int64_t pages);
    Eviction eviction_of(const Shelf& shelf, Node* node, std::int64_t pages) const;
    void take_off(Shelf& shelf, Node* node, std::int32_t count);
    std::int64_t last_boundary(std::int64_t begin, std::int64_t end, const std::int64_t* runs) const;
    void discard_way(Node* node);
    void use_way(Node* node, const std::vector<std::int64_t>& starts);
    void destroy(Node* node);
    void bury_all();
    const std::vector<std::pair<Arena*, std::int64_t>>& by_arena(const Needs& needs);

    int shift_;  // of a page size that is a power of two, its logarithm; else -1
    Children children_;
    std::unordered_map<std::string_view, Ref<Name>> names_;
    std::size_t sweep_at_ = 64;  // names at which those that nobody uses are dropped
    std::size_t stride_;         // bytes of a node with its entries and pins
    std::vector<std::unique_ptr<std::byte[]>> slabs_;
    std::size_t in_slabs_ = 0, left_in_slab_ = 0;
    Node* free_nodes_ = nullptr;  // by `next`
    std::vector<Node*> graveyard_;
    // Reused by each call.
    std::vector<std::int64_t> pair_;  // tokens of two pages
    std::vector<std::pair<Arena*, std::int64_t>> sums_;
    // Reused by each match: by kind, and by tier and kind.
    std::vector<std::int64_t> heads_, runs_, starts_;

  public:
    Children& children() { return children_; }
    void unlist(Node* root);
    void forget_detached();
};

}  // namespace rootcellar
