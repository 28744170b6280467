// The cache as a scheduler sees it: the tree, the leases of one cache, and copies under way. The twin of verbs.py,
// flights.py and control.py; what is only said in words (explanations, checks, errors) is left to Python.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tree.h"

namespace rootcellar {

// A copy that should happen; see Move in moves.py.
struct Move {
    std::int64_t id;
    int k;
    Tier src, dst;
    std::vector<std::int32_t> src_slots, dst_slots;
    std::int64_t first;
    std::vector<Digest> digests;
};

// What a peer may fetch; see Manifest and Part in moves.py.
struct Part {
    int k;
    std::int64_t first;
    std::vector<std::int32_t> slots;
    std::vector<Digest> digests;
};

struct Offer {
    std::int64_t id, tokens;
    std::vector<Part> parts;
};

// What to ask a tier of a key: tokens that can be resumed already, and by kind the first page to ask for.
struct Lacking {
    std::int64_t reach;
    std::vector<std::int64_t> firsts;
};

// One kind's page table: memory of a numpy array, a row per lease.
struct Table {
    std::int32_t* pages;
    std::int64_t width;
    std::int32_t* row(const Lease& lease) const { return pages + lease.row * width; }
};

// For `found` and `lost`: every kind.
constexpr int ALL = -1;

class Cache {
  public:
    Cache(const Settings& settings, const Sizes& sizes, std::vector<Table> tables);

    // verbs.cc
    // `room`: tokens by paged kind that must fit beside the lease; null: none are asked for.
    Ref<Lease> open(const Key& key, const Hit& hit, Tier tier, std::int64_t priority,
                    const std::vector<std::int64_t>* room);
    // `step`: for the next one; else for that of the call before. Less than 0 tokens: the last slots go back.
    bool grow(Lease& lease, std::int64_t tokens, bool step = true);
    void grow_many(const std::vector<Lease*>& leases, const std::int64_t* tokens, bool* answers);
    // One token more for each lease. False, and nothing changed, where they cannot be grown in one go.
    bool step(const std::vector<Lease*>& leases);
    void commit(Lease& lease, const Key& key, bool snapshot);
    void close(Lease& lease, bool keep);
    void must_be_open(const Lease& lease) const {
        if (lease.row <= 0 || lease.row > given.max_leases || leases[lease.row].get() != &lease)
            throw Refusal{"closed", {&lease}};
    }

    // flights.cc
    void done(std::int64_t move);
    void failed(std::int64_t move);
    void found(const Key& key, Tier tier, int kind, std::optional<std::int64_t> start);
    void lost(const Key& key, Tier tier, int kind, std::int64_t start);

    // control.cc
    std::int64_t pin(const Key& key, std::int64_t ttl);
    std::int64_t unpin(const Key& key);
    std::int64_t expect(const Key& key, std::int64_t when);
    std::int64_t foresee(const std::vector<Key>& keys);
    std::int64_t drop_namespace(const Ref<Name>& name);
    void forget_tier(Tier tier);
    void write_to(Tier tier, bool on);
    // Live leases, and copies under way, that touch a tier (TIERS: any).
    std::pair<std::int64_t, std::int64_t> busy(Tier tier) const;
    std::set<std::int64_t> prefetch(const Key& key, const Hit& hit, std::int64_t boundary);
    std::int64_t save(Tier tier);
    std::int64_t write_down(const Key& key);
    std::optional<Offer> offer(const Key& key, std::int64_t start);
    bool settle(std::int64_t offer);
    std::optional<Lacking> ask(const Key& key, Tier tier);
    void flush();

    std::int64_t boundary(const Hit& hit, Tier tier) const;

    Tree tree;
    const Settings& given = tree.given;
    std::vector<Table> tables;
    std::vector<Ref<Lease>> leases;  // by row; empty where no lease is live
    std::int64_t live = 0;
    std::vector<std::int32_t> free_rows;
    std::map<std::int64_t, Ref<Lease>> pins;               // by serial
    using Expiry = std::pair<std::int64_t, std::int64_t>;  // tick, serial of a pin
    std::map<std::int64_t, Ref<Lease>> offers;             // by id
    std::priority_queue<Expiry, std::vector<Expiry>, std::greater<>> expiries;
    std::int64_t serial = 0;
    std::vector<Shelf*> paged, windows, states;  // of the device
    std::int64_t requests = 0, input_tokens = 0, hit_tokens[TIERS] = {};
    // copies under way
    std::vector<Move> outbox;
    std::unordered_map<std::int64_t, std::unique_ptr<Flight>> flights;
    std::int64_t flight_serial = 0;
    std::int64_t flights_failed = 0;
    bool written[TIERS] = {};  // whether copies may be written there

  private:
    struct Piece {
        Node* node;
        std::int64_t first;
    };

    Ref<Lease> open_lease(const Key& key, const Hit& hit, Tier tier, std::int64_t priority,
                          const std::vector<std::int64_t>* room);
    bool fits_beside(const Hit& hit, std::int64_t pages, const std::vector<std::int64_t>& room);
    void pin_place(Lease& lease);
    void unpin_place(Lease& lease);
    void pin_windows(const Lease& lease, std::int32_t count);
    void pin_sources(Lease& lease, Node* node);
    bool load(Lease& lease);
    void fill_rows(const Lease& lease);
    void fill_row(const Lease& lease, const Shelf& shelf);
    void observe(Lease& lease, const Key& key, std::int64_t first, std::int64_t pages, bool resident);
    void step_states(Lease& lease);
    void read_own_states(Lease& lease);
    void release_passed(Lease& lease, Shelf& shelf, std::int64_t tokens);
    Node* insert(Lease& lease, const Key& key, std::int64_t page, std::int64_t pages);
    Node* insert_rest(const Lease& lease, Node* node, const Key& key, std::int64_t page, std::int64_t pages);
    bool may_lengthen(const Lease& lease, Node* node) const;
    void merge(const Lease& lease, Shelf& shelf, Node* node);
    void take_snapshot(Lease& lease);
    Node* drop_own(const Lease& lease);

    const Needs& staged(const Hit& hit, std::int64_t pages);
    Flight* plan(Node* node, Shelf& source, Shelf& target, std::int64_t start, bool held, Flight* after = nullptr);
    Flight* fetch(Node* node, Shelf& source, Shelf& target, std::int64_t start);
    void depart(Flight& flight);
    void call_off(const std::vector<Flight*>& some);
    Shelf& off_the_books(const Flight& flight);
    void lose(Flight& flight, Shelf& target);
    std::vector<Flight*> followers(const Flight& flight) const;
    void refresh_flight(const Flight& flight);
    void land(Flight& flight);
    Shelf* source_of(Node* node, int k, std::int64_t start, Tier exclude) const;
    Flight* flying_to(const Node* node, int k, Tier tier) const;
    std::vector<Piece> missing(Node* place, int k, std::int64_t start, Tier tier);
    void write_through(Node* place, std::int64_t hits);
    void copy_down(Node* node, Tier src, Tier dst);
    void spill(Node* node, Shelf& shelf);
    void attach_missing(Node* node, Shelf& shelf, const std::int32_t* pages, std::int64_t count, std::int64_t first);
    Node* lay_path(const Key& key, std::int64_t pages);
    std::unique_ptr<Flight> take_flight(std::int64_t move);

    std::int64_t save_from(Tier src, Tier dst);
    void expire();
    Ref<Lease> pin_at(std::int64_t number, Node* place, const Ref<Name>& name, std::int64_t length);
    void drop_pin(std::int64_t serial);
    void forget_due(Node* node);
    std::int64_t never(Node* place);

    std::int64_t batches_ = 0;
    // Reused by each call.
    std::vector<std::uint64_t> prefixes_;
    std::vector<std::int32_t> classes_, fresh_pages_;
    Needs needs_;
    std::vector<const std::int32_t*> new_pages_;
};

}  // namespace rootcellar
