// Runs: contiguous numbers in shared blocks, so that cutting an edge in two copies nothing.
//
// A run is a window on a block. Blocks are counted by reference and never change where a run looks at them; the unused
// room behind the last run of a block may be filled (an edge that grows token by token). A part that would keep more
// than MOST_HELD times its size in memory is a copy instead, so what is left of a long prompt does not hold all of it.
// A block may also be somebody else's memory, lent for as long as a run looks at it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace rootcellar {

constexpr std::size_t MOST_HELD = 8;

// Holds somebody else's memory as long as it lives.
class Owner {
  public:
    virtual ~Owner() = default;
};

// Numbers that will not change as long as their owner is held; `count` of them, of which a run wants a part.
template <class T>
struct Loan {
    std::unique_ptr<Owner> owner;
    const T* begin = nullptr;
    std::size_t count = 0;
};

// Bytes that a cache's structures hold now, and what was lent and can go when the verb is over: letting go of it may
// run anybody's code.
struct Ledger {
    std::size_t bytes = 0;
    std::vector<std::unique_ptr<Owner>> returned;
};

template <class T>
class Run {
    struct Block {
        Ledger* ledger;
        std::uint32_t references;
        std::uint32_t used;      // elements that some run looks at or looked at
        std::uint32_t capacity;  // elements
        bool lent;
        T* data() { return lent ? const_cast<T*>(loan().begin) : reinterpret_cast<T*>(this + 1); }
        Loan<T>& loan() { return *reinterpret_cast<Loan<T>*>(this + 1); }
        std::size_t bytes() const { return sizeof(Block) + (lent ? sizeof(Loan<T>) : 0) + capacity * sizeof(T); }
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

    // A run of the `count` elements from `from` on in memory that is lent.
    Run(Ledger& ledger, Loan<T> loan, const T* from, std::uint32_t count)
        : offset_(static_cast<std::uint32_t>(from - loan.begin)), count_(count) {
        const auto capacity = static_cast<std::uint32_t>(loan.count);
        void* memory = allocate(sizeof(Block) + sizeof(Loan<T>));
        block_ = new (memory) Block{&ledger, 1, capacity, capacity, true};
        new (&block_->loan()) Loan<T>(std::move(loan));
        ledger.bytes += block_->bytes();
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
            block_->ledger->bytes -= block_->bytes();
            if (block_->lent) {
                block_->ledger->returned.push_back(std::move(block_->loan().owner));
                block_->loan().~Loan<T>();
            }
            std::free(block_);
        }
        block_ = nullptr;
        offset_ = count_ = 0;
    }

    std::uint32_t size() const { return count_; }
    bool empty() const { return count_ == 0; }
    const T* data() const { return block_ == nullptr ? nullptr : block_->data() + offset_; }
    const T& operator[](std::size_t i) const { return data()[i]; }

    // The last element, to be written; null where another run may look at it.
    T* own_last() { return block_->references == 1 ? block_->data() + offset_ + count_ - 1 : nullptr; }

    // Elements [begin, end) as a run of their own: of the same block, or copied where the block is too much to hold.
    // `leaving`: the part is thrown away soon, so it is not worth a copy.
    Run part(std::uint32_t begin, std::uint32_t end, bool leaving = false) const {
        Run result;
        if (begin >= end) return result;
        if (!leaving && MOST_HELD * (end - begin) < block_->capacity)
            return Run(*block_->ledger, data() + begin, end - begin);
        result.block_ = block_;
        result.offset_ = offset_ + begin;
        result.count_ = end - begin;
        ++block_->references;
        return result;
    }

    // Whether these elements lie right behind the run in memory that is lent to it: `lengthen` is then all it takes.
    bool goes_on(const T* from, std::uint32_t count) const {
        return block_ != nullptr && block_->lent && from == data() + count_ &&
               count <= block_->capacity - offset_ - count_;
    }
    void lengthen(std::uint32_t count) { count_ += count; }

    // Add elements behind.
    void append(Ledger& ledger, const T* from, std::uint32_t count) {
        if (count != 0) std::memcpy(grow(ledger, count), from, count * sizeof(T));
    }

    // Room for elements behind, to be written: in the block where it has room, else in one with room for half as many
    // again.
    T* grow(Ledger& ledger, std::uint32_t count) {
        if (block_ != nullptr && block_->references == 1 && !block_->lent) block_->used = offset_ + count_;
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
        T* room = block_->data() + block_->used;
        block_->used += count;
        count_ += count;
        return room;
    }

  private:
    static void* allocate(std::size_t bytes) {
        void* memory = std::malloc(bytes);
        if (memory == nullptr) throw std::bad_alloc();
        return memory;
    }

    static Block* make(Ledger& ledger, std::uint32_t capacity) {
        void* memory = allocate(sizeof(Block) + capacity * sizeof(T));
        Block* block = new (memory) Block{&ledger, 1, 0, capacity, false};
        ledger.bytes += block->bytes();
        return block;
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
