#include "tree.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

namespace rootcellar {

namespace {
constexpr std::size_t MOST_NODES_IN_SLAB = 1024;  // a slab has as many nodes as all before it, up to this
}  // namespace

void broken(const std::string& what) {
    throw std::logic_error("rootcellar's native cache core: " + what);
}

// ---- making and unmaking -----------------------------------------------------------------------------------------

Tree::Tree(const Settings& settings, const Sizes& sizes)
    : given(settings),
      shift_(std::has_single_bit(static_cast<std::uint64_t>(page_size))
                 ? std::countr_zero(static_cast<std::uint64_t>(page_size))
                 : -1),
      children_(page_size) {
    if (given.policy == Policy::adaptive) shadow = std::make_unique<Shadow>(given.device_size, page_size, sizes.edges);
    for (const auto& [name, pages] : sizes.arenas) {
        std::unique_ptr<Order> order;
        if (shadow)
            order = std::make_unique<LearnedOrder>(*shadow);
        else
            order = std::make_unique<FixedOrder>();
        arenas.push_back(std::make_unique<Arena>(name, pages, std::move(order)));
    }
    for (auto& row : by_tier) row.assign(kinds.size(), nullptr);
    for (const ShelfSize& size : sizes.shelves) {
        const int index = static_cast<int>(shelves.size());
        shelves.push_back({index, size.k, kinds[size.k].rule, size.tier, arenas[size.arena].get()});
        Shelf& shelf = shelves.back();
        by_tier[size.tier][size.k] = &shelf;
        (shelf.full() ? full_shelves : window_shelves).push_back(&shelf);
        if (std::find(tiers.begin(), tiers.end(), size.tier) == tiers.end()) tiers.push_back(size.tier);
    }
    std::sort(tiers.begin(), tiers.end());
    for (std::size_t k = 0; k < kinds.size(); ++k) {
        const Kind& kind = kinds[k];
        if (kind.rule != Rule::full) windows.push_back(static_cast<int>(k));
        std::int64_t reset = 0;
        if (kind.rule == Rule::chunked_local) reset = kind.span;
        if (kind.rule == Rule::sliding_window && kind.span == 1) reset = 1;
        resets.push_back(reset == 0 ? 0 : std::lcm(reset, page_size) / page_size);
    }
    heads_.resize(kinds.size());
    starts_.resize(kinds.size());
    runs_.resize(kinds.size() * tiers.size());
    stride_ = sizeof(Node) + shelves.size() * sizeof(Entry) + kinds.size() * sizeof(Pins);
}

Tree::~Tree() {
    bury();
    std::vector<Node*> all = detached;
    for (Node* root = first_root; root != nullptr; root = root->next) all.push_back(root);
    for (std::size_t i = 0; i < all.size(); ++i)
        for (Node* child = all[i]->first_child; child != nullptr; child = child->next) all.push_back(child);
    for (Node* node : all) destroy(node);
}

Node* Tree::blank(Node* parent, Run<std::int64_t> tokens, std::int32_t start, std::int32_t size) {
    std::byte* memory;
    if (free_nodes_ != nullptr) {
        memory = reinterpret_cast<std::byte*>(free_nodes_);
        free_nodes_ = free_nodes_->next;
    } else {
        if (left_in_slab_ == 0) {
            left_in_slab_ = std::clamp<std::size_t>(in_slabs_, 16, MOST_NODES_IN_SLAB);
            in_slabs_ += left_in_slab_;
            slabs_.push_back(std::make_unique_for_overwrite<std::byte[]>(left_in_slab_ * stride_));
            ledger.bytes += left_in_slab_ * stride_;
        }
        memory = slabs_.back().get() + stride_ * --left_in_slab_;
    }
    Node* node = new (memory) Node;
    node->shelves = static_cast<std::uint16_t>(shelves.size());
    for (std::size_t s = 0; s < shelves.size(); ++s) new (&node->entry(static_cast<int>(s))) Entry;
    for (std::size_t k = 0; k < kinds.size(); ++k) (new (&node->pins(static_cast<int>(k))) Pins)->tick = tick;
    node->id = ++last_id;
    node->parent = parent;
    node->tokens = std::move(tokens);
    node->start = start;
    node->size = size;
    node->created = tick;
    return node;
}

void Tree::destroy(Node* node) {
    for (std::size_t k = 0; k < kinds.size(); ++k) node->pins(static_cast<int>(k)).~Pins();
    for (std::size_t s = 0; s < shelves.size(); ++s) node->entry(static_cast<int>(s)).~Entry();
    node->~Node();
}

void Tree::bury_all() {
    for (Node* node : graveyard_) {
        destroy(node);
        Node* unused = new (node) Node;  // the free list runs through `next`
        unused->next = free_nodes_;
        free_nodes_ = unused;
    }
    graveyard_.clear();
    // Last, and apart: it may call back into this cache.
    if (!ledger.returned.empty()) std::exchange(ledger.returned, {}).clear();
}

std::size_t Tree::bytes() const {
    std::size_t sum = ledger.bytes + children_.bytes() + evictions.bytes();
    for (const auto& arena : arenas) sum += arena->order->bytes() + arena->slots.bytes();
    if (shadow) sum += shadow->bytes();
    return sum;
}

Ref<Name> Tree::name(std::string_view text) {
    if (const auto found = names_.find(text); found != names_.end()) return found->second;
    if (names_.size() >= sweep_at_) {
        std::erase_if(names_,
                      [](const auto& item) { return item.second->references == 1 && item.second->root == nullptr; });
        sweep_at_ = std::max<std::size_t>(64, 2 * names_.size());
    }
    Ref<Name> name(new Name{std::string(text)});
    names_.emplace(name->text, name);
    return name;
}

// ---- structure ---------------------------------------------------------------------------------------------------

Node* Tree::root(const Ref<Name>& name) {
    if (name->root != nullptr) return name->root;
    Node* root = name->root = blank(nullptr, {}, 0, 0);
    root->name = name;
    root->listed = true;
    root->previous = last_root;
    (last_root == nullptr ? first_root : last_root->next) = root;
    last_root = root;
    return root;
}

void Tree::unlist(Node* root) {
    (root->previous == nullptr ? first_root : root->previous->next) = root->next;
    (root->next == nullptr ? last_root : root->next->previous) = root->previous;
    root->previous = root->next = nullptr;
    root->listed = false;
    root->name->root = nullptr;
}

// An edge refers to its key's memory rather than copy it where that never changes and is not too much to hold.
Run<std::int64_t> Tree::edge(const std::int64_t* tokens, std::int64_t count, Lender* lender) {
    if (lender != nullptr && count >= least_shared) {
        Loan<std::int64_t> loan = lender->lend();
        if (loan.owner && loan.count <= MOST_HELD * static_cast<std::size_t>(count))
            return Run<std::int64_t>(ledger, std::move(loan), tokens, static_cast<std::uint32_t>(count));
    }
    return Run<std::int64_t>(ledger, tokens, static_cast<std::uint32_t>(count));
}

Node* Tree::add(Node* parent, const std::int64_t* tokens, std::int32_t size, Lender* lender) {
    Node* node = blank(parent, edge(tokens, size * page_size, lender), parent->end(), size);
    node->hash = children_.hash(parent, tokens);
    children_.add(node);
    node->previous = parent->last_child;
    (parent->last_child == nullptr ? parent->first_child : parent->last_child->next) = node;
    parent->last_child = node;
    ++nodes;
    ++version;
    requeue_states(parent);
    return node;
}

std::int32_t Tree::common(const Node* node, const std::int64_t* tokens, std::int64_t limit) const {
    const std::int64_t pages = std::min<std::int64_t>(node->size, limit);
    if (pages == 1) return 1;  // it was found by that page
    constexpr std::int64_t step = 256;
    const std::int64_t span = pages * page_size;
    const std::int64_t* edge = node->tokens.data();
    for (std::int64_t at = page_size; at < span; at += step) {  // the first page is what it was found by
        const std::int64_t count = std::min(step, span - at);
        if (std::memcmp(edge + at, tokens + at, count * sizeof *edge) == 0) continue;
        std::int64_t i = at;
        while (edge[i] == tokens[i]) ++i;
        return static_cast<std::int32_t>(i / page_size);
    }
    return static_cast<std::int32_t>(pages);
}

Node* Tree::split(Node* node, std::int32_t at, bool leaving) {
    Node* parent = node->parent;
    if (parent == nullptr || at <= 0 || at >= node->size) broken("an edge is split outside itself");
    const auto cut = static_cast<std::uint32_t>(at * page_size);
    Node* upper = blank(parent, node->tokens.part(0, cut), node->start, at);
    upper->created = node->created;
    upper->hits = node->hits;
    upper->priority = node->priority;
    upper->owner = node->owner;
    upper->group = node->group;
    upper->used = node->used;
    for (std::size_t k = 0; k < kinds.size(); ++k) {
        upper->pins(k).tick = node->pins(k).tick;
        upper->pins(k).due = node->pins(k).due;
        upper->pins(k).turn = node->pins(k).turn;
    }
    if (node->queued >= 0) enqueue(upper);
    upper->refs = node->refs != 0 ? 1 : 0;
    upper->far = node->far != 0 ? 1 : 0;
    const std::uint32_t named = std::min<std::uint32_t>(node->digests.size(), at);
    upper->digests = node->digests.part(0, named);
    node->digests = node->digests.part(named, node->digests.size(), leaving);
    // The upper part takes the node's place among its siblings and in the table.
    upper->hash = node->hash;
    children_.replace(node, upper);
    upper->previous = node->previous;
    upper->next = node->next;
    (upper->previous == nullptr ? parent->first_child : upper->previous->next) = upper;
    (upper->next == nullptr ? parent->last_child : upper->next->previous) = upper;
    node->tokens = node->tokens.part(cut, node->tokens.size(), leaving);
    node->start += at;
    node->size -= at;
    node->parent = upper;
    node->previous = node->next = nullptr;
    upper->first_child = upper->last_child = node;
    node->hidden = leaving;
    if (!leaving) {
        node->hash = children_.hash(upper, node->tokens.data());
        children_.add(node);
    }
    if (node->has_flights()) {
        auto above = std::make_unique<std::vector<Flight*>>();
        for (Flight* flight : *node->flights)
            if (flight->start < node->start) above->push_back(flight);
        upper->flights = std::move(above);
    }
    for (const int k : windows) {
        Pins& lower_pins = node->pins(k);
        Pins& upper_pins = upper->pins(k);
        upper_pins.covers = lower_pins.covers;
        if (!lower_pins.starts) continue;
        std::vector<std::pair<std::int64_t, std::int32_t>> below;
        for (const auto& [page, count] : *lower_pins.starts) {
            if (page <= node->start) lower_pins.covers += count;
            if (page < node->start) upper_pins.add(page, count);
            if (page > node->start) below.emplace_back(page, count);
        }
        *lower_pins.starts = std::move(below);
    }
    ++nodes;
    ++version;
    split_entries(parent, upper, node, at);
    return upper;
}

void Tree::split_entries(Node* parent, Node* upper, Node* lower, std::int32_t at) {
    for (Shelf& shelf : shelves) {
        Entry& entry = lower->entry(shelf.index);
        if (!entry.present()) continue;
        Entry& above = upper->entry(shelf.index);
        above.kids = 1;
        if (entry.lo >= at) {
            entry.lo -= at;
            --parent->entry(shelf.index).kids;
        } else {
            const std::int32_t cut = at - entry.lo;
            above.pages = entry.pages.part(0, cut);
            above.lo = entry.lo;
            entry.pages = entry.pages.part(cut, entry.pages.size());
            entry.lo = 0;
            ++shelf.entries;
            refresh(upper, shelf);
        }
        refresh(lower, shelf);
    }
}

void Tree::discard_way(Node* node) {
    while (true) {
        if (node->held() || node->first_child != nullptr || node->has_flights()) return;
        for (const Shelf& shelf : shelves)
            if (node->entry(shelf.index).present()) return;
        Node* parent = node->parent;
        if (parent == nullptr) {
            forget_root(node);
            return;
        }
        if (!node->hidden) children_.remove(node);
        if (node->queued >= 0) queued[node->queued] = nullptr;
        (node->previous == nullptr ? parent->first_child : node->previous->next) = node->next;
        (node->next == nullptr ? parent->last_child : node->next->previous) = node->previous;
        node->previous = node->next = node->parent = nullptr;
        graveyard_.push_back(node);
        --nodes;
        ++version;
        requeue_states(parent);
        node = parent;
    }
}

void Tree::forget_root(Node* root) {
    if (root->listed) {
        unlist(root);
    } else if (root->detached) {
        std::erase(detached, root);
        root->detached = false;
    } else {
        return;
    }
    graveyard_.push_back(root);
}

void Tree::forget_detached() {
    for (Node* root : detached) {
        root->detached = false;
        if (root->first_child == nullptr) graveyard_.push_back(root);
    }
    detached.clear();
}

// ---- entries -----------------------------------------------------------------------------------------------------

void Tree::attach(Node* node, Shelf& shelf, const std::int32_t* pages, std::int32_t count, std::int32_t lo) {
    Entry& entry = node->entry(shelf.index);
    if (!entry.present()) {
        entry.pages = Pages(ledger, pages, count);
        ++shelf.entries;
        if (node->parent != nullptr) ++node->parent->entry(shelf.index).kids;
    } else {
        if (lo + count != entry.lo) broken("pages are attached apart from the entry");
        entry.pages.prepend(ledger, pages, count);
    }
    entry.lo = lo;
    shelf.cached += count;
    ++version;
    refresh(node, shelf);
    restage(node);
    if (journal) journal->came(node, shelf, lo, count);
}

// `lasting`: the tokens never change where they are.
void Tree::extend(Node* node, const std::int64_t* tokens, std::int32_t size,
                  const std::vector<const std::int32_t*>& pages, bool lasting) {
    const auto count = static_cast<std::uint32_t>(size * page_size);
    if (lasting && node->tokens.goes_on(tokens, count))
        node->tokens.lengthen(count);
    else
        node->tokens.append(ledger, tokens, count);
    node->size += size;
    for (Shelf* shelf : by_tier[DEVICE]) {
        if (shelf == nullptr || shelf->recurrent()) continue;
        node->entry(shelf->index).pages.append(ledger, pages[shelf->k], size);
        shelf->cached += size;
        refresh(node, *shelf);
        if (journal) journal->came(node, *shelf, node->size - size, size);
    }
    ++version;
}

Pages Tree::detach(Node* node, Shelf& shelf, std::int32_t count) {
    Entry& entry = node->entry(shelf.index);
    if (!entry.present()) broken("an entry that is not there is taken off its shelf");
    count = std::min(count, entry.count());
    if (journal) journal->left(node, shelf, entry.lo, count);
    shelf.cached -= count;
    ++version;
    Pages pages;
    if (count == entry.count()) {
        shelf.evictable -= entry.evictable;
        shelf.arena->evictable -= entry.evictable;
        --shelf.entries;
        shelf.arena->order->forget(entry);
        pages = std::move(entry.pages);
        entry.evictable = entry.lo = 0;
        if (node->parent != nullptr) {
            --node->parent->entry(shelf.index).kids;
            refresh(node->parent, shelf);
        }
    } else {
        pages = entry.pages.part(0, count);
        entry.pages = entry.pages.part(count, entry.pages.size());
        entry.lo += count;
        refresh(node, shelf);
    }
    return pages;
}

bool Tree::holds_any(Node* node, int k) const {
    for (const Tier tier : tiers) {
        const Shelf* shelf = by_tier[tier][k];
        if (shelf != nullptr && node->entry(shelf->index).present()) return true;
    }
    return node->has_flights() && std::any_of(node->flights->begin(), node->flights->end(),
                                              [k](const Flight* flight) { return flight->k == k; });
}

// Whether an entry on this shelf is all that keeps a node.
bool Tree::keeps(const Node* node, const Shelf& shelf) const {
    if (node->held() || node->first_child != nullptr || node->has_flights()) return false;
    return std::all_of(shelves.begin(), shelves.end(), [&](const Shelf& other) {
        return other.index == shelf.index || !node->entry(other.index).present();
    });
}

bool Tree::dead(Node* node) const {
    return std::any_of(full_shelves.begin(), full_shelves.end(), [&](const Shelf* shelf) {
        return !node->entry(shelf->index).present() && !holds_any(node, shelf->k);
    });
}

void Tree::refresh(Node* node, Shelf& shelf) {
    Entry& entry = node->entry(shelf.index);
    if (!entry.present()) return;
    std::int32_t evictable;
    bool ready;
    if (shelf.full()) {
        evictable = node->refs != 0 || (node->far != 0 && shelf.tier != DEVICE) ? 0 : entry.count();
        ready = evictable > 0 && entry.kids == 0;
    } else {
        evictable = unpinned(node, shelf, entry);
        ready = evictable > 0;
    }
    if (evictable != entry.evictable) {
        shelf.evictable += evictable - entry.evictable;
        shelf.arena->evictable += evictable - entry.evictable;
        entry.evictable = evictable;
    }
    if (ready && entry.filed < 0) shelf.arena->order->push(node, rank(node, shelf));
}

std::int32_t Tree::unpinned(Node* node, const Shelf& shelf, const Entry& entry) const {
    if (node->has_flights())
        for (const Flight* flight : *node->flights)
            if (flight->blocks(shelf.k, shelf.tier)) return 0;
    if (shelf.tier != DEVICE) return entry.count();
    const Pins& pins = node->pins(shelf.k);
    if (pins.covers != 0) return 0;
    std::int64_t first = node->size;
    if (pins.starts && !pins.starts->empty()) {
        first = pins.starts->front().first;
        for (const auto& [page, count] : *pins.starts) first = std::min(first, page);
        first -= node->start;
    }
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(first - entry.lo, 0, entry.count()));
}

const Digest& Tree::seed(Name& name) const {
    if (!name.seed) name.seed = seed_digest(given.fingerprint, name.text, page_size);
    return *name.seed;
}

const Digest& Tree::digest_before(const Node* node, std::int32_t page) const {
    while (node->parent != nullptr && node->start >= page) node = node->parent;
    return node->parent == nullptr ? seed(*node->name) : node->digests[page - 1 - node->start];
}

const Digest* Tree::page_digests(Node* node) {
    std::vector<Node*> path;
    for (Node* climb = node; climb->parent != nullptr && static_cast<std::int32_t>(climb->digests.size()) < climb->size;
         climb = climb->parent)
        path.push_back(climb);
    for (auto step = path.rbegin(); step != path.rend(); ++step) {
        Node* at = *step;
        const auto known = static_cast<std::int32_t>(at->digests.size());
        std::int32_t page = at->start + known;
        const std::int64_t* tokens = at->tokens.data() + known * page_size;
        Digest* into = at->digests.grow(ledger, at->size - known);
        if (page % 2 != 0) {  // the first page of its pair may lie in the node above
            const std::int64_t* before = known != 0 ? tokens : at->parent->tokens.data() + at->parent->size * page_size;
            pair_.assign(before - page_size, before);
            pair_.insert(pair_.end(), tokens, tokens + page_size);
            Digest both[2];
            chain(digest_before(at, page - 1), pair_.data(), 2, page_size, both);
            *into++ = both[1], tokens += page_size, ++page;
        }
        chain(digest_before(at, page), tokens, at->end() - page, page_size, into);
    }
    return node->digests.data();
}

}  // namespace rootcellar
