// How far a key is cached: the boundary search. The twin of match.py.
#include <algorithm>

#include "tree.h"

namespace rootcellar {

void Tree::find(const Key& key, Hit& hit) {
    hit.tree = this;
    hit.version = version;
    hit.path.clear();
    const std::int64_t total = page_at(key.count);
    const std::size_t count = kinds.size();
    std::fill(runs_.begin(), runs_.end(), 0);
    std::int64_t best[TIERS] = {};
    std::int64_t page = 0;
    const Node* node = key.name->root;
    while (node != nullptr && page < total) {
        const std::int64_t* rest = key.tokens + page * page_size;
        Node* child = children_.find(node, rest);
        if (child == nullptr) break;
        hit.path.push_back(child);
        const std::int64_t matched = common(child, rest, total - page);
        std::fill(heads_.begin(), heads_.end(), child->size);
        std::int64_t* run = runs_.data();
        for (const Tier tier : tiers) {
            for (std::size_t k = 0; k < count; ++k) {
                const Shelf* shelf = by_tier[tier][k];
                if (shelf == nullptr) continue;
                const Entry& entry = child->entry(shelf->index);
                if (entry.present() && entry.lo < heads_[k]) heads_[k] = entry.lo;
            }
            const std::int64_t boundary = last_boundary(page, page + matched, run);
            if (boundary > page) best[tier] = boundary;
            if (matched == child->size)
                for (std::size_t k = 0; k < count; ++k)
                    if (heads_[k] != 0) run[k] = page + heads_[k];
            run += count;
        }
        page += matched;
        if (matched < child->size) break;
        node = child;
    }
    std::int64_t farthest = 0;
    for (int tier = 0; tier < TIERS; ++tier) {
        farthest = std::max(farthest, best[tier] * page_size);
        hit.reaches[tier] = farthest;
    }
    hit.branch = page * page_size;
}

// The largest good boundary in pages (begin, end] of a node, with `heads_` the first page present by kind; `begin` when
// there is none. `start` of every rule never falls as n grows, so within one run a kind allows its last boundary or
// none; otherwise only the boundaries at which it needs nothing (`resets`) are left.
std::int64_t Tree::last_boundary(std::int64_t begin, std::int64_t end, const std::int64_t* runs) const {
    std::int64_t n = end;
    for (std::size_t k = 0; k < kinds.size();) {
        const std::int64_t head = begin + heads_[k];
        if (n > head) {
            const std::int64_t run = heads_[k] != 0 ? head : runs[k];
            if (run <= start_page(static_cast<int>(k), n * page_size)) {
                ++k;
                continue;
            }
        }
        const std::int64_t reset = resets[k];
        std::int64_t last = begin;
        if (reset != 0) {
            last = std::min(n, std::max(head, begin));
            last -= last % reset;
        }
        if (last <= begin) return begin;
        if (last == n) {
            ++k;
        } else {
            n = last;
            k = 0;
        }
    }
    return n;
}

Node* Tree::place_of(const Hit& hit, const Ref<Name>& name, std::int64_t pages) {
    if (pages == 0) return root(name);
    for (auto node = hit.path.rbegin(); node != hit.path.rend(); ++node)
        if ((*node)->start < pages)
            return (*node)->end() == pages ? *node : split(*node, static_cast<std::int32_t>(pages - (*node)->start));
    broken("a boundary is not on the path of its key");
}

void Tree::touch(const Hit& hit) {
    const std::int64_t pages = page_at(hit.reaches[PEER]);  // the farthest
    for (auto node = hit.path.rbegin(); node != hit.path.rend(); ++node) {
        if ((*node)->start >= pages) continue;
        for (std::size_t k = 0; k < kinds.size(); ++k) starts_[k] = start_page(static_cast<int>(k), pages * page_size);
        use(*node, starts_);
        return;
    }
}

}  // namespace rootcellar
