// What is asked of the cache beside the life of a lease: pins, namespaces, tiers, stores and peers. The twin of
// control.py.
#include <algorithm>
#include <utility>

#include "cache.h"

namespace rootcellar {

namespace {
constexpr std::int64_t FOREVER = std::int64_t{1} << 62;  // ticks; more could not be added to the tick of now
}

// ---- pins --------------------------------------------------------------------------------------------------------

// What a lease pins that has no row and resumes at `length` tokens.
Ref<Lease> Cache::pin_at(std::int64_t number, Node* place, const Ref<Name>& name, std::int64_t length) {
    const Ref<Lease> lease(new Lease);
    lease->serial = number;
    lease->node = place;
    lease->name = name;
    lease->cached = lease->length = lease->committed = length;
    pin_place(*lease);
    return lease;
}

std::int64_t Cache::pin(const Key& key, std::int64_t ttl) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t length = hit.reaches[DEVICE];
    if (length == 0) return 0;
    const Ref<Lease> lease = pin_at(++serial, tree.place_of(hit, key.name, length / tree.page_size), key.name, length);
    pins.emplace(lease->serial, lease);
    expiries.emplace(tree.tick + std::min(ttl, FOREVER), lease->serial);
    return length;
}

std::int64_t Cache::unpin(const Key& key) {
    Hit hit;
    tree.find(key, hit);
    std::vector<std::int64_t> gone;
    for (const auto& [number, lease] : pins)
        if (std::find(hit.path.begin(), hit.path.end(), lease->node) != hit.path.end()) gone.push_back(number);
    for (const std::int64_t number : gone) drop_pin(number);
    return static_cast<std::int64_t>(gone.size());
}

void Cache::expire() {
    while (!expiries.empty() && expiries.top().first <= tree.tick) {
        const std::int64_t number = expiries.top().second;
        expiries.pop();
        if (pins.contains(number)) drop_pin(number);
    }
}

void Cache::drop_pin(std::int64_t number) {
    const auto found = pins.find(number);
    const Ref<Lease> lease = found->second;
    pins.erase(found);
    unpin_place(*lease);
    tree.prune(lease->node);
}

// ---- what is said of the future ----------------------------------------------------------------------------------

std::int64_t Cache::expect(const Key& key, std::int64_t when) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t length = hit.reaches[DEVICE];
    const auto due = static_cast<std::int32_t>(std::max(NEVER, std::min(when, LATEST)));
    if (due == 0)
        for (auto node = hit.path.rbegin(); node != hit.path.rend(); ++node) forget_due(*node);
    if (due == 0 || length == 0) return length;
    Node* place = tree.place_of(hit, key.name, length / tree.page_size);
    if (due == NEVER) return never(place);
    for (int k = 0; k < static_cast<int>(tree.kinds.size()); ++k) {
        const std::int64_t start = tree.start_page(k, length);
        for (Node* climb = place; climb->parent != nullptr && climb->end() > start; climb = climb->parent) {
            const std::int32_t before = climb->pins(k).due;
            tree.expect(climb, k, before > 0 ? std::min(due, before) : due);
        }
    }
    return length;
}

std::int64_t Cache::foresee(const std::vector<Key>& keys) {
    const int count = static_cast<int>(tree.kinds.size());
    std::vector<Node*> before;
    before.swap(tree.queued);
    for (Node* node : before) {
        if (node == nullptr) continue;
        node->queued = -1;
        for (int k = 0; k < count; ++k) node->pins(k).turn = 0;
    }
    std::int64_t tokens = 0;
    Hit hit;
    for (std::size_t i = 0; i < keys.size() && tokens < given.device_size; ++i) {
        tree.find(keys[i], hit);
        std::int64_t last = 0;
        for (const std::int64_t reach : {hit.reaches[DEVICE], *std::max_element(hit.reaches, hit.reaches + TIERS)}) {
            if (reach == std::exchange(last, reach)) continue;
            Node* place = tree.place_of(hit, keys[i].name, reach / tree.page_size);
            for (int k = 0; k < count; ++k) {
                const std::int64_t start = tree.start_page(k, reach);
                for (Node* climb = place; climb->parent != nullptr && climb->end() > start; climb = climb->parent) {
                    if (climb->queued < 0) tokens += climb->size * tree.page_size;
                    tree.enqueue(climb);
                    std::int32_t& turn = climb->pins(k).turn;
                    if (turn == 0) turn = static_cast<std::int32_t>(i) + 1;
                }
            }
        }
    }
    before.insert(before.end(), tree.queued.begin(), tree.queued.end());
    for (Node* node : before)
        if (node != nullptr)
            for (Shelf& shelf : tree.shelves) tree.requeue(node, shelf);
    return tokens;
}

// Nobody said when a node is wanted, but for what is known of full attention below, which needs all above it.
void Cache::forget_due(Node* node) {
    for (int k = 0; k < static_cast<int>(tree.kinds.size()); ++k) {
        std::int32_t least = 0;
        if (tree.kinds[k].rule == Rule::full)
            for (Node* child = node->first_child; child != nullptr; child = child->next)
                if (const std::int32_t due = child->pins(k).due; due > 0) least = least > 0 ? std::min(least, due) : due;
        tree.expect(node, k, least);
    }
}

// Nobody will ask for a place again, nor for those above that only lead there; their tokens.
std::int64_t Cache::never(Node* place) {
    const int count = static_cast<int>(tree.kinds.size());
    const auto any = [count](Node* node, auto says) {
        for (int k = 0; k < count; ++k)
            if (says(node->pins(k).due)) return true;
        return false;
    };
    std::int64_t pages = 0;
    for (; place->parent != nullptr; place = place->parent) {
        if (any(place, [](std::int32_t due) { return due > 0; })) break;
        bool wanted = false;
        for (Node* child = place->first_child; child != nullptr && !wanted; child = child->next)
            wanted = any(child, [](std::int32_t due) { return due >= 0; });
        if (wanted) break;
        for (int k = 0; k < count; ++k) tree.expect(place, k, static_cast<std::int32_t>(NEVER));
        pages += place->size;
    }
    return pages * tree.page_size;
}

// ---- namespaces and tiers ----------------------------------------------------------------------------------------

std::int64_t Cache::drop_namespace(const Ref<Name>& name) {
    Node* root = name->root;
    if (root == nullptr) return 0;
    tree.unlist(root);
    std::vector<std::int64_t> gone;
    for (const auto& [number, lease] : pins)
        if (lease->name.get() == name.get()) gone.push_back(number);
    for (const std::int64_t number : gone) drop_pin(number);
    root->detached = true;
    tree.detached.push_back(root);
    std::int64_t held = 0;
    std::vector<Node*> stack;
    for (Node* child = root->first_child; child != nullptr; child = child->next) stack.push_back(child);
    while (!stack.empty()) {
        Node* node = stack.back();
        stack.pop_back();
        if (!node->held()) {
            tree.drop_subtree(node);
            continue;
        }
        held += node->size * tree.page_size;
        for (Node* child = node->first_child; child != nullptr; child = child->next) stack.push_back(child);
    }
    ++tree.version;
    return held;
}

std::pair<std::int64_t, std::int64_t> Cache::busy(Tier tier) const {
    const std::int64_t copies = std::count_if(flights.begin(), flights.end(), [tier](const auto& item) {
        return tier == TIERS || item.second->src == tier || item.second->dst == tier;
    });
    if (tier != TIERS && tier != DEVICE) return {0, copies};
    return {live, copies + static_cast<std::int64_t>(offers.size())};
}

void Cache::forget_tier(Tier tier) {
    while (tier == DEVICE && !pins.empty()) drop_pin(pins.begin()->first);
    std::vector<Node*> stack, order, roots;
    for (Node* root = tree.first_root; root != nullptr; root = root->next) roots.push_back(root);
    roots.insert(roots.end(), tree.detached.begin(), tree.detached.end());
    for (const Node* root : roots)
        for (Node* child = root->first_child; child != nullptr; child = child->next) stack.push_back(child);
    while (!stack.empty()) {
        Node* node = stack.back();
        stack.pop_back();
        order.push_back(node);
        for (Node* child = node->first_child; child != nullptr; child = child->next) stack.push_back(child);
    }
    for (auto node = order.rbegin(); node != order.rend(); ++node) {
        for (Shelf* shelf : tree.by_tier[tier])
            if (shelf != nullptr) tree.forget_entry(*shelf, *node);
        tree.prune(*node);
    }
}

void Cache::write_to(Tier tier, bool on) {
    const bool there = std::find(tree.tiers.begin(), tree.tiers.end(), tier) != tree.tiers.end();
    if (!there || (tier != HOST && tier != STORAGE)) throw Refusal{"not_written", {std::int64_t{tier}}};
    written[tier] = on;
}

void Cache::flush() {
    if (tree.journal) tree.journal->silent = true;
    std::vector<Ref<Name>> names;
    for (Node* root = tree.first_root; root != nullptr; root = root->next) names.push_back(root->name);
    for (const Ref<Name>& name : names) drop_namespace(name);
    tree.forget_detached();
    if (!tree.journal) return;
    tree.journal->silent = false;
    KVEvent cleared{};
    cleared.what = KVEvent::What::cleared;
    tree.journal->events.push_back(std::move(cleared));
}

// ---- copies on request -------------------------------------------------------------------------------------------

std::set<std::int64_t> Cache::prefetch(const Key& key, const Hit& hit, std::int64_t boundary) {
    std::set<std::int64_t> ids;
    Hit again;
    const Hit* fresh = &hit;
    if (!tree.is_fresh(hit)) {
        tree.find(key, again);
        fresh = &again;
    }
    boundary = std::min(boundary, fresh->reaches[PEER]);
    Node* place = tree.place_of(*fresh, key.name, boundary / tree.page_size);
    tree.hold(place);
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        const int kind = static_cast<int>(k);
        Shelf* target = tree.shelf(HOST, kind);
        for (const Piece& piece : missing(place, kind, tree.start_page(kind, boundary), HOST)) {
            Flight* flight = flying_to(piece.node, kind, HOST);
            if (flight == nullptr) {
                Shelf* source = source_of(piece.node, kind, piece.first, HOST);
                if (source == nullptr || target == nullptr) break;
                flight = plan(piece.node, *source, *target, piece.first, true);
                if (flight == nullptr) break;
            }
            ids.insert(flight->id);
        }
    }
    tree.release(place);
    tree.prune(place);
    return ids;
}

std::int64_t Cache::save(Tier tier) {
    // What HOST has and is to be read there is not evicted for what comes to HOST.
    const std::int64_t planned = tier >= STORAGE && written[STORAGE] ? save_from(HOST, STORAGE) : 0;
    return planned + (tier >= HOST && written[HOST] ? save_from(DEVICE, HOST) : 0);
}

// Plan to copy all that `src` holds and `dst` lacks; the number of moves.
std::int64_t Cache::save_from(Tier src, Tier dst) {
    std::int64_t planned = 0;
    std::vector<Node*> nodes;
    for (Node* root = tree.first_root; root != nullptr; root = root->next)
        for (Node* child = root->first_child; child != nullptr; child = child->next) nodes.push_back(child);
    for (std::size_t i = 0; i < nodes.size(); ++i) {  // parents first: the list grows as it is read
        Node* node = nodes[i];
        for (Node* child = node->first_child; child != nullptr; child = child->next) nodes.push_back(child);
        for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
            Shelf* source = tree.shelf(src, static_cast<int>(k));
            Shelf* target = tree.shelf(dst, static_cast<int>(k));
            if (source == nullptr || target == nullptr || node->entry(target->index).present()) continue;
            const Entry& entry = node->entry(source->index);
            if (entry.present() && flying_to(node, static_cast<int>(k), dst) == nullptr)
                planned += plan(node, *source, *target, node->start + entry.lo, true) != nullptr;
        }
    }
    return planned;
}

// Plan to write down what resuming as far as the device has `key` needs; the number of moves.
std::int64_t Cache::write_down(const Key& key) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t length = hit.reaches[DEVICE];
    if (length == 0) return 0;
    const std::size_t before = flights.size();
    Node* place = tree.place_of(hit, key.name, length / tree.page_size);
    tree.hold(place);  // room is not made of the same prefix
    write_through(place, 0);
    tree.release(place);
    tree.prune(place);
    return static_cast<std::int64_t>(flights.size() - before);
}

// ---- stores and peers --------------------------------------------------------------------------------------------

std::optional<Lacking> Cache::ask(const Key& key, Tier tier) {
    Hit hit;
    tree.find(key, hit);
    Lacking lacking{hit.reaches[tier], {}};
    const std::vector<Shelf*>& there = tree.by_tier[tier];
    if (!given.reuse || key.count < lacking.reach + tree.page_size ||
        std::find(there.begin(), there.end(), nullptr) != there.end())
        return {};
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        std::int64_t first = tree.start_page(static_cast<int>(k), lacking.reach + tree.page_size);
        for (const Node* node : hit.path) {
            std::int64_t begins = node->end();
            for (const Tier nearer : tree.tiers) {
                const Shelf* shelf = tree.shelf(nearer, static_cast<int>(k));
                if (nearer > tier || shelf == nullptr) continue;
                const Entry& entry = node->entry(shelf->index);
                if (entry.present()) begins = std::min<std::int64_t>(begins, node->start + entry.lo);
            }
            if (node->end() > first && begins > first) break;
            first = std::max(first, std::min<std::int64_t>(node->end(), tree.page_at(hit.branch)));
        }
        lacking.firsts.push_back(first);
    }
    return lacking;
}

std::optional<Offer> Cache::offer(const Key& key, std::int64_t start) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t pages = tree.page_at(hit.reaches[DEVICE]), least = start / tree.page_size;
    if (pages <= least) return {};
    Offer offer{++flight_serial, hit.reaches[DEVICE], {}};
    Node* place = tree.place_of(hit, key.name, pages);
    const Ref<Lease> lease = pin_at(offer.id, place, key.name, offer.tokens);
    offers.emplace(offer.id, lease);
    tree.page_digests(place);
    for (const Shelf* shelf : tree.by_tier[DEVICE]) {
        Part part{shelf->k, std::max(least, lease->starts[shelf->k]), {}, {}};
        std::vector<const Node*> path;
        for (const Node* climb = place; climb->end() > part.first && climb->parent != nullptr; climb = climb->parent)
            path.push_back(climb);
        for (auto at = path.rbegin(); at != path.rend(); ++at) {
            const Node* node = *at;
            const auto begin = static_cast<std::int32_t>(std::max<std::int64_t>(part.first, node->start) - node->start);
            const Entry& entry = node->entry(shelf->index);
            const std::vector<std::int32_t> held = entry.pages.all(begin - entry.lo);
            part.slots.insert(part.slots.end(), held.begin(), held.end());
            part.digests.insert(part.digests.end(), node->digests.data() + begin, node->digests.data() + node->size);
        }
        if (!part.slots.empty()) offer.parts.push_back(std::move(part));
    }
    return offer;
}

bool Cache::settle(std::int64_t offer) {
    const auto found = offers.find(offer);
    if (found == offers.end()) return false;
    const Ref<Lease> lease = found->second;
    offers.erase(found);
    unpin_place(*lease);
    tree.prune(lease->node);
    return true;
}

}  // namespace rootcellar
