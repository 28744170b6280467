// Runs: contiguous numbers in shared blocks, so that cutting an edge in two copies nothing.
//
// A run is a window on a block. Blocks are counted by reference and never change where a run looks at them; the unused
// room behind the last run of a block may be filled (an edge that grows token by token). A part that would keep more
// than twice its size in memory is a copy instead, so what is left of a long prompt does not hold all of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace rootcellar {

// Bytes that a cache's structures have allocated now.
struct Ledger {
    std::size_t bytes = 0;
};

template <class T>
class Run {
    struct Block {
        Ledger* ledger;
        std::uint32_t references;
        std::uint32_t used;      // elements that some run looks at or looked at
        std::uint32_t capacity;  // elements
        T* data() { return reinterpret_cast<T*>(this + 1); }
    };

  public:
    Run() = default;

    // A run of `count` elements copied from `from`.
    Run(Ledger& ledger, const T* from, std::uint32_t count) : count_(count) {
        if (count == 0) return;
        block_ = make(ledger, count);
        std::memcpy(block_->data(), from, count * sizeof(T));
        block_->used = count;
    }

    Run(Run&& other) noexcept
        : block_(std::exchange(other.block_, nullptr)),
          offset_(std::exchange(other.offset_, 0)),
          count_(std::exchange(other.count_, 0)) {}

    Run& operator=(Run&& other) noexcept {
        std::swap(block_, other.block_);
        std::swap(offset_, other.offset_);
        std::swap(count_, other.count_);
        return *this;
    }

    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    ~Run() { clear(); }

    void clear() {
        if (block_ != nullptr && --block_->references == 0) {
            block_->ledger->bytes -= size_of(block_->capacity);
            std::free(block_);
        }
        block_ = nullptr;
        offset_ = count_ = 0;
    }

    std::uint32_t size() const { return count_; }
    bool empty() const { return count_ == 0; }
    const T* data() const { return block_ == nullptr ? nullptr : block_->data() + offset_; }
    const T& operator[](std::size_t i) const { return data()[i]; }

    // Elements [begin, end) as a run of their own: of the same block, or copied where that wastes less memory.
    Run part(std::uint32_t begin, std::uint32_t end) const {
        Run result;
        if (begin >= end) return result;
        if (2 * static_cast<std::uint64_t>(end - begin) < block_->capacity)
            return Run(*block_->ledger, data() + begin, end - begin);
        result.block_ = block_;
        result.offset_ = offset_ + begin;
        result.count_ = end - begin;
        ++block_->references;
        return result;
    }

    // Add elements behind; in place where the block has room, else in a block with room for half as many again.
    void append(Ledger& ledger, const T* from, std::uint32_t count) {
        if (count == 0) return;
        if (block_ != nullptr && block_->references == 1) block_->used = offset_ + count_;
        if (block_ == nullptr || block_->used != offset_ + count_ || block_->capacity - block_->used < count) {
            const std::uint32_t wanted = count_ + count;
            Block* larger = make(ledger, block_ == nullptr ? wanted : wanted + wanted / 2);
            if (count_ != 0) std::memcpy(larger->data(), data(), count_ * sizeof(T));
            const std::uint32_t kept = count_;
            clear();
            block_ = larger;
            count_ = kept;
            block_->used = kept;
        }
        std::memcpy(block_->data() + block_->used, from, count * sizeof(T));
        block_->used += count;
        count_ += count;
    }

    // Add elements in front.
    void prepend(Ledger& ledger, const T* from, std::uint32_t count) {
        Run whole;
        whole.block_ = make(ledger, count + count_);
        std::memcpy(whole.block_->data(), from, count * sizeof(T));
        if (count_ != 0) std::memcpy(whole.block_->data() + count, data(), count_ * sizeof(T));
        whole.count_ = whole.block_->used = count + count_;
        *this = std::move(whole);
    }

  private:
    static std::size_t size_of(std::uint32_t capacity) { return sizeof(Block) + capacity * sizeof(T); }

    static Block* make(Ledger& ledger, std::uint32_t capacity) {
        void* memory = std::malloc(size_of(capacity));
        if (memory == nullptr) throw std::bad_alloc();
        ledger.bytes += size_of(capacity);
        return new (memory) Block{&ledger, 1, 0, capacity};
    }

    Block* block_ = nullptr;
    std::uint32_t offset_ = 0;
    std::uint32_t count_ = 0;
};

// A counted reference to an object with a member `references`.
template <class T>
class Ref {
  public:
    Ref() = default;
    explicit Ref(T* object) : object_(object) {
        if (object_ != nullptr) ++object_->references;
    }
    Ref(const Ref& other) : Ref(other.object_) {}
    Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Ref& operator=(Ref other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Ref() {
        if (object_ != nullptr && --object_->references == 0) delete object_;
    }
    T* get() const { return object_; }
    T* operator->() const { return object_; }
    T& operator*() const { return *object_; }
    explicit operator bool() const { return object_ != nullptr; }

  private:
    T* object_ = nullptr;
};

}  // namespace rootcellar
