// What the radix tree is made of: kinds, nodes, the entries they hold, and the shelves that entries stand on.
//
// The Python twin (node.py) explains the shapes. What is particular here:
//   - a node lies in a slab, followed by one Entry per shelf and one Pins per kind;
//   - it is in exactly one of: the tree (alive), the graveyard (until the verb that threw it away ends), the free list;
//   - children are a list in the order in which they came; who begins with a page is found in one table (children.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "digest.h"
#include "pages.h"
#include "run.h"

namespace rootcellar {

enum class Rule : std::uint8_t { full, sliding_window, chunked_local, recurrent };

enum Tier : int { DEVICE, HOST, STORAGE, PEER, TIERS };

struct Kind {
    std::string name;
    Rule rule;
    std::int64_t span;

    // First cached position needed to resume at position `n` (tokens).
    std::int64_t start(std::int64_t n) const {
        switch (rule) {
            case Rule::full: return 0;
            case Rule::sliding_window: return std::max<std::int64_t>(0, n - span + 1);
            case Rule::chunked_local: return n - n % span;
            case Rule::recurrent: break;
        }
        return std::max<std::int64_t>(0, n - 1);
    }
};

struct Node;
struct Flight;

// A namespace. It lives as long as a root, a lease or a hit names it.
struct Name {
    std::string text;  // UTF-8
    Node* root = nullptr;
    std::optional<Digest> seed = {};  // computed when it is first asked for
    std::uint32_t references = 0;
};

// Pages [lo, lo + pages.size()) of a node on one shelf, counted from the node's start; none: no entry.
struct Entry {
    Pages pages;
    std::int32_t lo = 0;
    std::int32_t evictable = 0;
    std::int32_t kids = 0;    // children of the node that hold an entry on this shelf
    std::int32_t filed = -1;  // ticket of a heap of the arena's order; -1: not filed
    std::int32_t heap = 0;    // which heap

    bool present() const { return !pages.empty(); }
    std::int32_t count() const { return pages.size(); }
};

// What is pinned of one kind in a node.
struct Pins {
    std::int64_t tick = 0;    // when the node last served the kind
    std::int32_t covers = 0;  // pins that cover the node from its start
    std::int32_t due = 0;     // when it is wanted again, NEVER, or 0: nobody said
    std::int32_t turn = 0;    // the place in line of the first who waits for it; 0: nobody does
    // Absolute page where a pin starts inside the node -> how many; most nodes have none.
    std::unique_ptr<std::vector<std::pair<std::int64_t, std::int32_t>>> starts;

    // `count` more pins (fewer, when negative) start at `page`.
    void add(std::int64_t page, std::int32_t count) {
        if (!starts) starts = std::make_unique<std::vector<std::pair<std::int64_t, std::int32_t>>>();
        const auto at =
            std::find_if(starts->begin(), starts->end(), [page](const auto& item) { return item.first == page; });
        if (at == starts->end())
            starts->emplace_back(page, count);
        else if ((at->second += count) == 0)
            starts->erase(at);
    }
};

struct Node {
    Node* parent = nullptr;
    Run<std::int64_t> tokens;
    std::int32_t start = 0;  // pages
    std::int32_t size = 0;
    std::uint64_t hash = 0;  // of the parent and the first page: where the table files it
    std::int32_t refs = 0;   // places at the node plus held children
    std::int32_t far = 0;    // the same of flights that leave the device alone
    std::int32_t queued = -1;  // its place among the tree's nodes that have a turn; -1: it has none
    std::int32_t group = 0;  // the adaptive policy's class, and the volume at the last use
    std::int64_t used = 0;
    std::int64_t hits = 0;
    std::int64_t priority = 0;
    std::int64_t id = 0;
    std::int64_t created = 0;
    std::int64_t owner = 0;  // serial of the lease that added the node
    Node* first_child = nullptr;
    Node* last_child = nullptr;
    Node* next = nullptr;  // siblings, in the order in which they came; of a root: the roots
    Node* previous = nullptr;
    std::unique_ptr<std::vector<Flight*>> flights;
    Run<Digest> digests;  // of the first pages of the edge, as far as they were asked for
    Ref<Name> name;       // of a root
    std::uint16_t shelves = 0;
    bool hidden = false;    // about to be thrown away, and not found by its first page any more
    bool listed = false;    // a root that can be found by its name
    bool detached = false;  // a root that was dropped and is still held

    std::int32_t end() const { return start + size; }
    bool held() const { return refs != 0 || far != 0; }
    Entry& entry(int shelf) { return reinterpret_cast<Entry*>(this + 1)[shelf]; }
    const Entry& entry(int shelf) const { return reinterpret_cast<const Entry*>(this + 1)[shelf]; }
    Pins& pins(int kind) { return reinterpret_cast<Pins*>(reinterpret_cast<Entry*>(this + 1) + shelves)[kind]; }
    bool has_flights() const { return flights != nullptr && !flights->empty(); }
};

// The free pages of one arena, a stack: slots.py says how it is used.
class Slots {
  public:
    explicit Slots(std::int32_t pages);

    std::int32_t pages() const { return pages_; }
    std::int32_t free_pages() const { return free_; }
    void take(std::int32_t* into, std::int32_t count);
    std::int32_t take_one();
    void give(const std::int32_t* pages, std::int32_t count) {
        must_lack(count);
        if (count == 1)
            push(*pages, 1);
        else
            give_many(pages, count);
    }
    void give(const Pages& pages);
    std::vector<std::int32_t> free_list() const;  // next to be taken first
    std::size_t bytes() const { return stack_.capacity() * sizeof(Span); }

  private:
    struct Span {
        std::int32_t first, count;
    };
    void push(std::int32_t first, std::int32_t count) {
        free_ += count;
        if (!stack_.empty() && first + count == stack_.back().first)
            stack_.back() = {first, stack_.back().count + count};
        else
            stack_.push_back({first, count});
    }
    void give_many(const std::int32_t* pages, std::int32_t count);
    void must_hold(std::int32_t count) const;
    void must_lack(std::int32_t count) const {
        if (count > pages_ - free_) too_many();
    }
    [[noreturn]] static void too_many();

    std::int32_t pages_, free_;
    std::vector<Span> stack_;  // the last is taken first, from its first page on
    std::vector<Span> given_;  // reused by each call
};

class Order;

// Pages that one shelf has for itself or several share, and the one order in which their entries leave.
struct Arena {
    Slots slots;
    std::unique_ptr<Order> order;
    std::string name;
    std::int32_t evictable = 0;

    Arena(std::string its_name, std::int32_t pages, std::unique_ptr<Order> its_order);
    ~Arena();
    std::int32_t room() const { return slots.free_pages() + evictable; }
};

// One kind on one tier: the arena that its pages come from, and its counts (all in pages).
struct Shelf {
    int index;
    int k;  // index of the kind
    Rule rule;
    Tier tier;
    Arena* arena;
    std::int32_t used = 0;  // taken from the arena and not given back
    std::int64_t entries = 0;
    std::int32_t cached = 0;
    std::int32_t evictable = 0;
    std::int32_t in_flight = 0;
    std::int64_t evicted = 0;

    bool full() const { return rule == Rule::full; }
    bool recurrent() const { return rule == Rule::recurrent; }
    void take(std::int32_t* into, std::int32_t count) {
        arena->slots.take(into, count);
        used += count;
    }
    std::int32_t take_one() {
        ++used;
        return arena->slots.take_one();
    }
    void give(const std::int32_t* pages, std::int32_t count) {
        arena->slots.give(pages, count);
        used -= count;
    }
    void give(const Pages& pages) {
        arena->slots.give(pages);
        used -= pages.size();
    }
};

// A running request's hold on the cache; lease.py says what the fields mean.
struct Lease {
    std::uint32_t references = 0;
    std::int32_t row = 0;
    std::int64_t length = 0;  // tokens
    std::int64_t batch = 0;   // the last batch it was in
    std::int64_t committed = 0;
    std::int64_t serial = 0;
    Node* node = nullptr;
    Ref<Name> name;
    std::int64_t cached = 0;
    std::int64_t priority = 0;
    std::vector<std::int64_t> starts;  // by kind: absolute page at which the pin begins
    std::vector<Node*> sources;        // by kind: the node whose recurrent snapshot is being read
    std::vector<std::int64_t> waits;
    bool stepped = false;
    bool lost = false;
    // The adaptive policy: strides observed, hash of the prefix, class of the last known prefix above.
    std::int64_t strides = 0;
    std::uint64_t prefix = 0;
    std::int32_t above = -1;
};

// A move under way, as the tree sees it; moves.py says what the fields mean.
struct Flight {
    std::int64_t id;
    int k;
    Tier src, dst;
    std::int32_t start;
    bool held;
    std::vector<std::int32_t> slots;
    Node* node = nullptr;
    Flight* after = nullptr;
    std::vector<Ref<Lease>> waiters;

    bool far() const { return src != DEVICE && dst != DEVICE; }  // the device has no part in it
    bool blocks(int kind, Tier tier) const { return kind == k && (tier == dst || (held && tier == src)); }
};

// Lends the memory of a key's tokens, where it can.
class Lender {
  public:
    virtual ~Lender() = default;
    virtual Loan<std::int64_t> lend() = 0;  // without an owner: it cannot
};

// A key as a verb sees it: int64 tokens of the caller, alive during the call.
struct Key {
    const std::int64_t* tokens = nullptr;
    std::int64_t count = 0;
    Ref<Name> name;
    Lender* lender = nullptr;  // of tokens that never change, which the tree may refer to instead of copying them
};

}  // namespace rootcellar
