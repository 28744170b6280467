// The life of a lease: open, grow, commit, close. The twin of verbs.py.
#include <algorithm>
#include <cstring>
#include <utility>

#include "cache.h"

namespace rootcellar {

Cache::Cache(const Settings& settings, const Sizes& sizes, std::vector<Table> its_tables)
    : tree(settings, sizes), tables(std::move(its_tables)), leases(given.max_leases + 1) {
    for (std::int32_t row = given.max_leases; row > 0; --row) free_rows.push_back(row);
    for (Shelf* shelf : tree.by_tier[DEVICE]) {
        if (shelf == nullptr) continue;
        (shelf->recurrent() ? states : paged).push_back(shelf);
        if (!shelf->recurrent() && !shelf->full()) windows.push_back(shelf);
    }
    for (const std::int64_t tier : given.written) written[tier] = true;
    if (given.write_back) tree.spill = [this](Node* node, Shelf& shelf) { spill(node, shelf); };
    new_pages_.resize(tree.kinds.size());
}

std::int64_t Cache::boundary(const Hit& hit, Tier tier) const {
    std::int64_t reach = hit.reaches[DEVICE];
    for (const Tier farther : tree.tiers)
        if (farther <= tier && hit.reaches[farther] - reach >= given.loads[farther]) reach = hit.reaches[farther];
    return reach;
}

// ---- open --------------------------------------------------------------------------------------------------------

Ref<Lease> Cache::open(const Key& key, const Hit& hit, Tier tier, std::int64_t priority,
                       const std::vector<std::int64_t>* room) {
    if (!expiries.empty()) expire();
    Hit again;
    const Hit* fresh = &hit;
    if (!tree.is_fresh(hit)) {
        tree.find(key, again);
        fresh = &again;
        if (room != nullptr && boundary(again, tier) < boundary(hit, tier)) return {};
    }
    // The reaches are counted as they were seen, whatever opening does to the tree.
    const Ref<Lease> lease = open_lease(key, *fresh, tier, priority, room);
    if (lease) {
        ++requests;
        input_tokens += key.count;
        std::int64_t counted = 0;
        for (const Tier nearer : tree.tiers) {
            const std::int64_t reached = std::min(fresh->reaches[nearer], lease->cached);
            hit_tokens[nearer] += std::max<std::int64_t>(0, reached - counted);
            counted = std::max(counted, reached);
        }
    }
    return lease;
}

Ref<Lease> Cache::open_lease(const Key& key, const Hit& hit, Tier tier, std::int64_t priority,
                             const std::vector<std::int64_t>* room) {
    if (free_rows.empty()) return {};
    if (key.count > given.max_length) throw Refusal{"key_too_long", {key.count, given.max_length}};
    Hit again;
    const Hit* fresh = &hit;
    if (!tree.is_fresh(hit)) {
        tree.find(key, again);
        fresh = &again;
    }
    std::int64_t reach = boundary(*fresh, tier);
    if (tier > HOST && !tree.fits(staged(*fresh, tree.page_at(reach)))) {
        tier = HOST;
        reach = boundary(*fresh, tier);
    }
    if (room != nullptr && !fits_beside(*fresh, tree.page_at(reach), *room)) return {};
    Node* node = tree.place_of(*fresh, key.name, tree.page_at(reach));
    const Ref<Lease> lease(new Lease);
    lease->serial = serial + 1;
    lease->node = node;
    lease->name = key.name;
    lease->cached = lease->length = lease->committed = reach;
    lease->priority = priority;
    pin_place(*lease);
    if (!load(*lease)) {
        unpin_place(*lease);
        tree.prune(lease->node);
        // What is nearer can still be had when only the copies do not fit together.
        if (reach == fresh->reaches[DEVICE] || (room != nullptr && tier <= HOST)) return {};
        return open_lease(key, *fresh, tier > HOST ? HOST : DEVICE, priority, room);
    }
    ++tree.tick;
    tree.use(node, lease->starts);
    ++serial;
    lease->row = free_rows.back();
    free_rows.pop_back();
    leases[lease->row] = lease;
    ++live;
    fill_rows(*lease);
    for (Shelf* shelf : states) shelf->take(tables[shelf->k].row(*lease) + 1, 1);
    for (Node* climb = node; climb != nullptr; climb = climb->parent) {
        ++climb->hits;
        climb->priority = std::max(climb->priority, priority);
    }
    if (tree.shadow && given.reuse) {
        tree.shadow->advance(key.count);
        lease->prefix = mix(crc32(key.name->text));
        observe(*lease, key, 0, tree.page_at(reach), true);
    }
    return lease;
}

void Cache::pin_place(Lease& lease) {
    const std::size_t count = tree.kinds.size();
    lease.starts.resize(count);
    for (std::size_t k = 0; k < count; ++k) lease.starts[k] = tree.start_page(static_cast<int>(k), lease.cached);
    lease.sources.assign(count, nullptr);
    tree.hold(lease.node);
    pin_windows(lease, 1);
    pin_sources(lease, lease.node);
}

void Cache::unpin_place(Lease& lease) {
    pin_windows(lease, -1);
    pin_sources(lease, nullptr);
    tree.release(lease.node);
}

void Cache::pin_windows(const Lease& lease, std::int32_t count) {
    for (const Shelf* shelf : windows) tree.pin(lease.node, shelf->k, lease.starts[shelf->k], count);
}

void Cache::pin_sources(Lease& lease, Node* node) {
    for (const Shelf* shelf : states) {
        Node* old = lease.sources[shelf->k];
        if (node != nullptr && node->parent != nullptr) tree.pin(node, shelf->k, node->end() - 1, 1);
        if (old != nullptr && old->parent != nullptr) tree.pin(old, shelf->k, old->end() - 1, -1);
        lease.sources[shelf->k] = node;
    }
}

void Cache::fill_rows(const Lease& lease) {
    for (const Shelf* shelf : paged) fill_row(lease, *shelf);
    for (const Shelf* shelf : states) {
        Node* source = lease.sources[shelf->k];
        if (source == nullptr || source->parent == nullptr) continue;
        const Entry& entry = source->entry(shelf->index);
        if (entry.present()) tables[shelf->k].row(lease)[0] = entry.pages.front();
    }
}

void Cache::fill_row(const Lease& lease, const Shelf& shelf) {
    const std::int64_t start = lease.starts[shelf.k];
    std::int32_t* row = tables[shelf.k].row(lease);
    for (Node* climb = lease.node; climb != nullptr && climb->end() > start; climb = climb->parent) {
        const Entry& entry = climb->entry(shelf.index);
        if (!entry.present()) continue;
        const std::int64_t first = std::max<std::int64_t>(start, climb->start + entry.lo);
        entry.pages.copy(static_cast<std::int32_t>(first - climb->start - entry.lo), entry.count(), row + first);
    }
}

void Cache::observe(Lease& lease, const Key& key, std::int64_t first, std::int64_t pages, bool resident) {
    Shadow& shadow = *tree.shadow;
    const std::int64_t strides = lease.strides, from = strides * shadow.stride;
    shadow.hashes(lease.prefix, key.tokens + std::min(from, key.count), pages * tree.page_size - from, prefixes_);
    shadow.observe(prefixes_, resident, lease.above, classes_);
    lease.strides += static_cast<std::int64_t>(prefixes_.size());
    if (!prefixes_.empty()) lease.prefix = prefixes_.back();
    const std::int64_t per_stride = shadow.stride / tree.page_size;
    const auto known = static_cast<std::int64_t>(classes_.size());
    Node* climb = lease.node;
    while (known != 0 && climb->parent != nullptr && climb->end() > first) {
        // Python's floor division: a node that ends before the observed strides has a negative number of them.
        std::int64_t last = std::max<std::int64_t>(0, std::min(climb->end() / per_stride - strides, known) - 1);
        climb->group = classes_[last];
        climb->used = shadow.volume;
        while (last > 0 && classes_[last - 1] == climb->group) --last;
        const std::int64_t begin = (strides + last) * per_stride;
        if (last > 0 && climb->start < begin && begin < climb->end())
            tree.split(climb, static_cast<std::int32_t>(begin - climb->start));
        climb = climb->parent;
    }
}

// ---- grow --------------------------------------------------------------------------------------------------------

bool Cache::grow(Lease& lease, std::int64_t tokens, bool step) {
    must_be_open(lease);
    if (tokens > given.max_length - lease.length) throw Refusal{"row_full", {lease.length, tokens, given.max_length}};
    const std::int64_t old = tree.pages_of(lease.length), kept = tree.pages_of(lease.length + tokens);
    if (lease.length + tokens < lease.committed || kept < *std::max_element(lease.starts.begin(), lease.starts.end()))
        throw Refusal{"gives_too_much", {-tokens, lease.length, lease.committed}};
    const std::int64_t fresh = kept - old;
    if (fresh > 0) {
        needs_.clear();
        for (Shelf* shelf : paged) needs_.emplace_back(shelf, fresh);
        if (!tree.make_room_for(needs_)) return false;
        for (Shelf* shelf : paged) shelf->take(tables[shelf->k].row(lease) + old, static_cast<std::int32_t>(fresh));
    }
    if (fresh < 0) {
        for (Shelf* shelf : paged) {
            std::int32_t* row = tables[shelf->k].row(lease);
            shelf->give(row + kept, static_cast<std::int32_t>(-fresh));
            std::fill(row + kept, row + old, 0);
        }
    }
    if (tokens > 0 && step) step_states(lease);
    lease.length += tokens;
    return true;
}

void Cache::grow_many(const std::vector<Lease*>& batch, const std::int64_t* tokens, bool* answers) {
    if (std::all_of(tokens, tokens + batch.size(), [](std::int64_t count) { return count == 1; }) && step(batch)) {
        std::fill(answers, answers + batch.size(), true);
        return;
    }
    for (std::size_t i = 0; i < batch.size(); ++i) answers[i] = grow(*batch[i], tokens[i]);
}

bool Cache::step(const std::vector<Lease*>& batch) {
    std::int64_t fresh = 0;
    bool together = true;  // different leases, in rows that have room
    ++batches_;
    for (Lease* lease : batch) {
        const bool once = std::exchange(lease->batch, batches_) != batches_;
        together = together && once && lease->length < given.max_length;
        if (!tree.begins_page(lease->length)) continue;
        ++fresh;
        // Rows lie far apart: fetch them all before the first is written.
        for (const Shelf* shelf : paged)
            __builtin_prefetch(tables[shelf->k].row(*lease) + tree.page_at(lease->length), 1);
    }
    if (!together) return false;
    if (fresh != 0) {
        needs_.clear();
        for (Shelf* shelf : paged) needs_.emplace_back(shelf, fresh);
        if (!tree.make_room_for(needs_)) return false;
        for (Shelf* shelf : paged) {
            const Table& table = tables[shelf->k];
            for (const Lease* lease : batch)
                if (tree.begins_page(lease->length)) table.row(*lease)[tree.page_at(lease->length)] = shelf->take_one();
        }
    }
    for (Lease* lease : batch) {
        if (!states.empty()) step_states(*lease);
        ++lease->length;
    }
    return true;
}

void Cache::step_states(Lease& lease) {
    if (lease.stepped) read_own_states(lease);
    lease.stepped = true;
}

void Cache::read_own_states(Lease& lease) {
    for (const Shelf* shelf : states) {
        std::int32_t* row = tables[shelf->k].row(lease);
        row[0] = row[1];
    }
    pin_sources(lease, nullptr);
}

// ---- commit ------------------------------------------------------------------------------------------------------

void Cache::commit(Lease& lease, const Key& key, bool snapshot) {
    must_be_open(lease);
    const std::int64_t size = tree.page_size;
    if (key.count > lease.length || key.name.get() != lease.name.get())
        throw Refusal{"commit_too_long", {key.count, key.name->text, lease.length, lease.name->text}};
    if (given.reuse) {
        pin_windows(lease, -1);
        const std::int64_t done = tree.page_at(lease.committed), pages = tree.page_at(key.count);
        if (pages > done) {
            Node* place = insert(lease, key, done, pages);
            if (place != lease.node) {
                tree.hold(place);
                if (given.write_after >= 0) write_through(lease.node, given.write_after);
                tree.release(lease.node);
                lease.node = place;
            }
            lease.committed = pages * size;
            if (tree.shadow) observe(lease, key, done, pages, false);
            if (given.digests) tree.page_digests(lease.node);
        }
    }
    for (Shelf* shelf : windows) release_passed(lease, *shelf, key.count);
    if (given.reuse) {
        pin_windows(lease, 1);
        if (snapshot && key.count == lease.length && lease.length == lease.committed) take_snapshot(lease);
    }
}

void Cache::release_passed(Lease& lease, Shelf& shelf, std::int64_t tokens) {
    const std::int64_t old = lease.starts[shelf.k], start = tree.start_page(shelf.k, tokens);
    if (start <= old) return;
    std::int32_t* row = tables[shelf.k].row(lease);
    const std::int64_t owned = std::max(old, tree.page_at(lease.committed));
    if (owned < start) shelf.give(row + owned, static_cast<std::int32_t>(start - owned));
    std::fill(row + old, row + start, 0);
    lease.starts[shelf.k] = start;
}

Node* Cache::insert(Lease& lease, const Key& key, std::int64_t page, std::int64_t pages) {
    Node* node = lease.node;
    while (page < pages) {
        const std::int64_t* tokens = key.tokens + page * tree.page_size;
        Node* child = tree.children().find(node, tokens);
        if (child == nullptr) return insert_rest(lease, node, key, page, pages);
        const std::int32_t matched = tree.common(child, tokens, pages - page);
        if (matched < child->size) child = tree.split(child, matched);
        for (Shelf* shelf : paged) merge(lease, *shelf, child);
        for (std::size_t k = 0; k < tree.kinds.size(); ++k) child->pins(static_cast<int>(k)).tick = tree.tick;
        child->priority = std::max(child->priority, lease.priority);
        page += matched;
        node = child;
    }
    return node;
}

Node* Cache::insert_rest(const Lease& lease, Node* node, const Key& key, std::int64_t page, std::int64_t pages) {
    const auto size = static_cast<std::int32_t>(pages - page);
    const std::int64_t* tokens = key.tokens + page * tree.page_size;
    for (const Shelf* shelf : paged) new_pages_[shelf->k] = tables[shelf->k].row(lease) + page;
    if (node == lease.node && may_lengthen(lease, node)) {
        tree.extend(node, tokens, size, new_pages_, key.lender != nullptr);
        return node;
    }
    Node* leaf = tree.add(node, tokens, size, key.lender);
    leaf->owner = lease.serial;
    leaf->priority = lease.priority;
    for (Shelf* shelf : paged) tree.attach(leaf, *shelf, new_pages_[shelf->k], size, 0);
    return leaf;
}

bool Cache::may_lengthen(const Lease& lease, Node* node) const {
    if (node->owner != lease.serial || node->refs != 1 || node->first_child != nullptr || node->has_flights())
        return false;
    std::size_t held = 0;
    for (const Shelf& shelf : tree.shelves) held += node->entry(shelf.index).present();
    return held == paged.size() && std::all_of(paged.begin(), paged.end(), [node](const Shelf* shelf) {
               return node->entry(shelf->index).present();
           });
}

void Cache::merge(const Lease& lease, Shelf& shelf, Node* node) {
    std::int32_t* row = tables[shelf.k].row(lease) + node->start;
    const Entry& entry = node->entry(shelf.index);
    if (!entry.present()) {
        tree.attach(node, shelf, row, node->size, 0);
        return;
    }
    const std::int32_t lo = entry.lo;
    shelf.give(row + lo, node->size - lo);
    entry.pages.copy(0, entry.count(), row + lo);
    if (lo != 0) tree.attach(node, shelf, row, lo, 0);
}

void Cache::take_snapshot(Lease& lease) {
    Node* node = lease.node;
    std::vector<Shelf*> lacking;
    for (Shelf* shelf : states)
        if (!node->entry(shelf->index).present()) lacking.push_back(shelf);
    if (lacking.empty() || !lease.stepped || node->parent == nullptr) return;
    read_own_states(lease);
    needs_.clear();
    for (Shelf* shelf : lacking) needs_.emplace_back(shelf, 1);
    if (!tree.make_room_for(needs_)) return;
    for (Shelf* shelf : lacking) {
        std::int32_t* row = tables[shelf->k].row(lease);
        tree.attach(node, *shelf, row + 1, 1, node->size - 1);
        shelf->take(row + 1, 1);
    }
    for (const Shelf* shelf : states) tables[shelf->k].row(lease)[0] = node->entry(shelf->index).pages.front();
    pin_sources(lease, node);
    lease.stepped = false;
}

// ---- close -------------------------------------------------------------------------------------------------------

void Cache::close(Lease& lease, bool keep) {
    must_be_open(lease);
    const Ref<Lease> still(&lease);
    leases[lease.row] = {};
    --live;
    const std::int64_t committed = tree.page_at(lease.committed), pages = tree.pages_of(lease.length);
    for (Shelf* shelf : paged) {
        const std::int64_t owned = std::max(committed, lease.starts[shelf->k]);
        if (owned < pages) shelf->give(tables[shelf->k].row(lease) + owned, static_cast<std::int32_t>(pages - owned));
    }
    for (Shelf* shelf : states) shelf->give(tables[shelf->k].row(lease) + 1, 1);
    for (const Table& table : tables) {
        std::int32_t* row = table.row(lease);
        std::fill(row, row + std::min(table.width, std::max<std::int64_t>(pages, 2)), 0);
    }
    free_rows.push_back(lease.row);
    tree.use(lease.node, lease.starts);
    if (keep && given.write_after >= 0) write_through(lease.node, given.write_after);
    unpin_place(lease);
    tree.prune(keep ? lease.node : drop_own(lease));
    lease.node = nullptr;
}

Node* Cache::drop_own(const Lease& lease) {
    std::vector<Node*> path = {lease.node};
    while (path.back()->parent != nullptr) path.push_back(path.back()->parent);
    for (std::size_t i = 0; i + 1 < path.size(); ++i) {
        Node* node = path[i];
        if (node->parent == nullptr) continue;  // it held nothing and went with the node below
        if (node->owner != lease.serial || node->held() || node->first_child != nullptr || node->hits != 0)
            return node;
        tree.drop_subtree(node);
    }
    return path.back();
}

}  // namespace rootcellar
