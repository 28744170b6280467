// What happened to the cache: KV events, and a short memory of evictions. journal.py says what they are for.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "node.h"

namespace rootcellar {

struct Tree;

struct KVEvent {
    enum class What { stored, removed, cleared } what;
    std::vector<Digest> digests;
    bool has_parent = false;
    Digest parent{};
    std::vector<std::int64_t> tokens;
    Tier medium = DEVICE;
    Ref<Name> name;
};

// KV events of one kind (the first that is full attention, else the first).
class Journal {
  public:
    explicit Journal(Tree& tree);
    void came(Node* node, const Shelf& shelf, std::int32_t lo, std::int32_t count);
    void left(Node* node, const Shelf& shelf, std::int32_t lo, std::int32_t count);
    std::vector<KVEvent> events;
    bool silent = false;

  private:
    Tree& tree_;
    int k_;
};

struct Eviction {
    std::int64_t tick;
    int k;
    Tier tier;
    std::int64_t tokens;
    std::int64_t created, used;  // ticks at which the node was made and last served the kind
};

// The last evictions, by the node above and the first page of what went, or by node and kind; the oldest is forgotten.
class Evictions {
  public:
    struct Note {
        std::int64_t where;
        std::string what;
        std::uint64_t hash;
        Eviction eviction;
        std::int32_t older, newer;
    };
    Evictions();
    void note(std::int64_t where, std::string_view what, const Eviction& eviction);
    const Eviction* find(std::int64_t where, std::string_view what) const;
    std::deque<Eviction> take();  // since the last call, the oldest first
    template <class Visit>
    void each(Visit visit) const {  // the oldest first
        for (std::int32_t i = oldest_; i >= 0; i = notes_[i].newer) visit(notes_[i]);
    }
    std::size_t bytes() const;

  private:
    std::size_t slot_of(std::uint64_t hash, std::int64_t where, std::string_view what) const;
    void unlink(std::int32_t index);
    void remove_slot(std::size_t hole);

    std::vector<Note> notes_;
    std::vector<std::int32_t> table_;
    std::int32_t oldest_ = -1, newest_ = -1;
    std::deque<Eviction> untold_;
};

}  // namespace rootcellar
