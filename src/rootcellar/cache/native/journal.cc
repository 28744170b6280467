#include "journal.h"

#include "hash.h"
#include "tree.h"

namespace rootcellar {

namespace {
constexpr std::size_t REMEMBERED = 4096;
}

Journal::Journal(Tree& tree) : tree_(tree), k_(0) {
    for (int k = static_cast<int>(tree.kinds.size()) - 1; k >= 0; --k)
        if (tree.kinds[k].rule == Rule::full) k_ = k;
}

void Journal::came(Node* node, const Shelf& shelf, std::int32_t lo, std::int32_t count) {
    if (silent || shelf.k != k_) return;
    const Digest* digests = tree_.page_digests(node);
    KVEvent event{KVEvent::What::stored,
                  {digests + lo, digests + lo + count},
                  lo != 0 || node->start != 0,
                  {},
                  {},
                  shelf.tier,
                  {}};
    if (lo != 0)
        event.parent = digests[lo - 1];
    else if (node->start != 0)
        event.parent = node->parent->digests[node->parent->digests.size() - 1];
    const Node* root = node;
    while (root->parent != nullptr) root = root->parent;
    event.name = root->name;
    const std::int64_t* tokens = node->tokens.data() + lo * tree_.page_size;
    event.tokens.assign(tokens, tokens + count * tree_.page_size);
    events.push_back(std::move(event));
}

void Journal::left(Node* node, const Shelf& shelf, std::int32_t lo, std::int32_t count) {
    if (silent || shelf.k != k_) return;
    const Digest* digests = tree_.page_digests(node);
    events.push_back({KVEvent::What::removed, {digests + lo, digests + lo + count}, false, {}, {}, shelf.tier, {}});
}

Evictions::Evictions() : table_(4 * REMEMBERED, -1) {}

std::size_t Evictions::bytes() const {
    std::size_t sum = notes_.capacity() * sizeof(Note) + table_.capacity() * sizeof(std::int32_t);
    for (const Note& note : notes_) sum += note.what.capacity();
    return sum + untold_.size() * sizeof(Eviction);
}

std::size_t Evictions::slot_of(std::uint64_t hash, std::int64_t where, std::string_view what) const {
    const std::size_t mask = table_.size() - 1;
    std::size_t at = hash & mask;
    while (table_[at] >= 0) {
        const Note& note = notes_[table_[at]];
        if (note.hash == hash && note.where == where && note.what == what) break;
        at = (at + 1) & mask;
    }
    return at;
}

void Evictions::unlink(std::int32_t index) {
    const Note& note = notes_[index];
    (note.older < 0 ? oldest_ : notes_[note.older].newer) = note.newer;
    (note.newer < 0 ? newest_ : notes_[note.newer].older) = note.older;
}

void Evictions::remove_slot(std::size_t hole) {
    const std::size_t mask = table_.size() - 1;
    for (std::size_t at = (hole + 1) & mask; table_[at] >= 0; at = (at + 1) & mask) {
        const std::size_t home = notes_[table_[at]].hash & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            table_[hole] = table_[at];
            hole = at;
        }
    }
    table_[hole] = -1;
}

std::deque<Eviction> Evictions::take() {
    return std::exchange(untold_, {});
}

void Evictions::note(std::int64_t where, std::string_view what, const Eviction& eviction) {
    untold_.push_back(eviction);
    if (untold_.size() > REMEMBERED) untold_.pop_front();
    const std::uint64_t hash = hash_of(where, what.data(), what.size());
    std::int32_t index = table_[slot_of(hash, where, what)];
    if (index >= 0) {
        unlink(index);
    } else {
        if (notes_.size() < REMEMBERED) {
            index = static_cast<std::int32_t>(notes_.size());
            notes_.emplace_back();
        } else {
            index = oldest_;
            remove_slot(slot_of(notes_[index].hash, notes_[index].where, notes_[index].what));
            unlink(index);
        }
        notes_[index].where = where;
        notes_[index].what.assign(what);
        notes_[index].hash = hash;
        table_[slot_of(hash, where, what)] = index;
    }
    Note& note = notes_[index];
    note.eviction = eviction;
    note.older = newest_;
    note.newer = -1;
    (newest_ < 0 ? oldest_ : notes_[newest_].newer) = index;
    newest_ = index;
}

const Eviction* Evictions::find(std::int64_t where, std::string_view what) const {
    const std::int32_t index = table_[slot_of(hash_of(where, what.data(), what.size()), where, what)];
    return index < 0 ? nullptr : &notes_[index].eviction;
}

}  // namespace rootcellar
