// The tree for pictures. The twin of views.py, which says what the fields are and in which order nodes come.
#include <algorithm>
#include <queue>
#include <tuple>

#include "python.h"

namespace rootcellar {

namespace {

constexpr std::int64_t HEAD = 32;

struct Candidate {
    std::tuple<bool, std::int64_t, std::int64_t, std::int64_t> rank;  // the smallest comes first
    Node* node;
    const Name* name;

    bool operator<(const Candidate& other) const { return other.rank < rank; }  // priority_queue gives the largest
};

std::int64_t last_use(Tree& tree, Node* node) {
    std::int64_t last = 0;
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) last = std::max(last, node->pins(static_cast<int>(k)).tick);
    return last;
}

nb::tuple view_of(Tree& tree, Node* node, const Name& name, std::int64_t children) {
    nb::list head, held;
    const std::int64_t shown = std::min(HEAD, node->size * tree.page_size);
    for (std::int64_t i = 0; i < shown; ++i) head.append(node->tokens.data()[i]);
    for (const Shelf& shelf : tree.shelves) {
        const Entry& entry = node->entry(shelf.index);
        if (entry.present()) held.append(nb::make_tuple(shelf.index, entry.count()));
    }
    const Node* parent = node->parent;
    return nb::make_tuple(node->id, parent->parent == nullptr ? 0 : parent->id, python_name(name.text), node->start,
                          node->size, nb::tuple(head), held, node->hits, node->created, last_use(tree, node),
                          node->held(), children);
}

}  // namespace

nb::list tree_of(Cache& cache, std::int64_t limit) {
    Tree& tree = cache.tree;
    std::priority_queue<Candidate> open;
    const auto open_children = [&](const Node* node, const Name* name) {
        std::int64_t count = 0;
        for (Node* child = node->first_child; child != nullptr; child = child->next, ++count)
            open.push({{!child->held(), -child->hits, -last_use(tree, child), child->id}, child, name});
        return count;
    };
    for (const Node* root = tree.first_root; root != nullptr; root = root->next) open_children(root, root->name.get());
    nb::list views;
    for (std::int64_t i = 0; i < limit && !open.empty(); ++i) {
        const Candidate best = open.top();
        open.pop();
        const std::int64_t children = open_children(best.node, best.name);
        views.append(view_of(tree, best.node, *best.name, children));
    }
    return views;
}

nb::tuple trail_of(Cache& cache, const Key& key) {
    Hit hit;
    cache.tree.find(key, hit);
    nb::list ids;
    for (const Node* node : hit.path) ids.append(node->id);
    return nb::tuple(ids);
}

// The eviction of the page after what the tree knows of a key, if it is remembered.
const Eviction* last_eviction_of(Cache& cache, const Key& key) {
    Tree& tree = cache.tree;
    Hit hit;
    tree.find(key, hit);
    const Node* node = hit.path.empty() ? key.name->root : hit.path.back();
    if (node == nullptr || hit.branch != node->end() * tree.page_size) return nullptr;
    if (key.count < hit.branch + tree.page_size) return nullptr;
    const auto* page = reinterpret_cast<const char*>(key.tokens + hit.branch);
    return tree.evictions.find(node->id, {page, tree.page_size * sizeof(std::int64_t)});
}

}  // namespace rootcellar
