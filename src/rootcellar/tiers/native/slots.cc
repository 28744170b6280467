// Images between memory and adjacent slots of a file, with their checksums, without Python's lock: what slotio.py does,
// with one pass over memory less. What is read comes through a small buffer that stays in the processor's near caches,
// and is summed up while it is copied on; what is written is summed up before it has left them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "xxh3.h"

namespace nb = nanobind;
using namespace nanobind::literals;

namespace rootcellar {

namespace {

constexpr std::size_t kBlock = 4096;
// Bytes from which on two threads sum up images: two cores get more from memory than one.
constexpr std::size_t kShared = 4 << 20;
constexpr std::size_t kParts = 512;  // of a system call, which takes 1,024 at most

// The memory of Python objects, as long as this lives.
class Views {
  public:
    Views(const nb::list& objects, bool writable) : buffers_(objects.size()) {
        for (std::size_t i = 0; i < objects.size(); ++i, ++held_) {
            const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
            if (PyObject_GetBuffer(nb::handle(objects[i]).ptr(), &buffers_[i], flags) != 0) {
                release();
                throw nb::python_error();
            }
        }
    }
    ~Views() { release(); }
    Views(const Views&) = delete;

    std::size_t count() const { return buffers_.size(); }
    unsigned char* at(std::size_t i) const { return static_cast<unsigned char*>(buffers_[i].buf); }
    std::size_t length(std::size_t i) const { return static_cast<std::size_t>(buffers_[i].len); }

  private:
    void release() {
        while (held_ > 0) PyBuffer_Release(&buffers_[--held_]);
    }

    std::vector<Py_buffer> buffers_;
    std::size_t held_ = 0;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of this thread for a piece, aligned as direct transfers want it.
unsigned char* bounce(std::size_t nbytes) {
    thread_local std::unique_ptr<void, Free> memory;
    thread_local std::size_t size = 0;
    if (size < nbytes) {
        memory.reset(std::aligned_alloc(kBlock, nbytes));
        size = memory ? nbytes : 0;
        if (!memory) throw std::bad_alloc();
    }
    return static_cast<unsigned char*>(memory.get());
}

struct Run {
    const Views& views;
    std::vector<xxh3::Hash> hashes;
    std::size_t stride;

    Run(const Views& views, const std::vector<std::uint64_t>& seeds, std::size_t stride, std::size_t piece,
        const std::string& vectors)
        : views(views), stride(stride) {
        const xxh3::AddBlocks add = xxh3::find_vectors(vectors.c_str());
        if (add == nullptr) throw nb::value_error("this processor lacks those vectors");
        if (seeds.size() != views.count() || stride % kBlock != 0) throw nb::value_error("no such slots");
        if (piece == 0 || piece % kBlock != 0) throw nb::value_error("no such piece");
        hashes.reserve(views.count());
        for (std::size_t i = 0; i < views.count(); ++i) {
            const std::size_t length = views.length(i);
            if (length <= 240 || length > stride || stride - length >= kBlock) throw nb::value_error("no such image");
            hashes.emplace_back(views.at(i), length, seeds[i], add);
        }
    }

    // Calls `each(image, first byte of it, bytes)` for what of the images lies in bytes [start, stop) of the run.
    template <class Each>
    void within(std::size_t start, std::size_t stop, const Each& each) {
        for (std::size_t i = start / stride; i < views.count() && i * stride < stop; ++i) {
            const std::size_t first = std::max(start, i * stride) - i * stride;
            const std::size_t last = std::min(stop - i * stride, views.length(i));
            if (first < last) each(i, first, last - first);
        }
    }

    nb::list sums(std::size_t done) {
        nb::list found;
        for (std::size_t i = 0; i < views.count(); ++i) {
            if (i * stride + views.length(i) <= done) {
                found.append(hashes[i].digest());
            } else {
                found.append(nb::none());
            }
        }
        return found;
    }
};

void fail(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

nb::list read_slots(int fd, std::int64_t at, std::size_t stride, const nb::list& into,
                    const std::vector<std::uint64_t>& seeds, std::size_t piece, const std::string& vectors) {
    const Views views(into, true);
    Run run(views, seeds, stride, piece, vectors);
    const std::size_t total = stride * views.count();
    std::size_t done = 0;  // of whole pieces, but for the last
    int error = 0;
    {
        const nb::gil_scoped_release without;
        while (done < total) {
            const std::size_t wanted = std::min(piece, total - done);
            unsigned char* buffer = bounce(piece);
            std::size_t got = 0;
            while (got < wanted) {
                const ssize_t more = pread(fd, buffer + got, wanted - got, at + static_cast<std::int64_t>(done + got));
                if (more < 0 && errno == EINTR) continue;
                if (more < 0) error = errno;
                if (more <= 0) break;
                got += static_cast<std::size_t>(more);
            }
            run.within(done, done + got, [&](std::size_t i, std::size_t first, std::size_t count) {
                run.hashes[i].add(count, views.at(i) + first, buffer + (i * stride + first - done));
            });
            done += got;
            if (got < wanted) break;  // the file ends, or what comes cannot be read
        }
    }
    if (error != 0 && done < stride) fail(error);
    return run.sums(done);
}

int write_all(int fd, std::vector<iovec>& parts, std::int64_t at) {
    std::size_t next = 0;
    while (next < parts.size()) {
        const auto count = static_cast<int>(std::min(kParts, parts.size() - next));
        const ssize_t wrote = pwritev(fd, parts.data() + next, count, at);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) return errno;
        if (wrote == 0) return EIO;  // it would again
        at += wrote;
        std::size_t left = static_cast<std::size_t>(wrote);
        while (next < parts.size() && left >= parts[next].iov_len) left -= parts[next++].iov_len;
        if (left > 0) {
            parts[next].iov_base = static_cast<unsigned char*>(parts[next].iov_base) + left;
            parts[next].iov_len -= left;
        }
    }
    return 0;
}

nb::list write_slots(int fd, std::int64_t at, std::size_t stride, const nb::list& from,
                     const std::vector<std::uint64_t>& seeds, std::size_t piece, bool gathers,
                     const std::string& vectors) {
    static unsigned char zeros[kBlock] = {};
    const Views views(from, false);
    Run run(views, seeds, stride, piece, vectors);
    const std::size_t total = stride * views.count();
    int error = 0;
    {
        const nb::gil_scoped_release without;
        std::vector<iovec> parts;
        for (std::size_t done = 0; done < total && error == 0; done += piece) {
            const std::size_t stop = std::min(done + piece, total);
            parts.clear();
            if (gathers) {
                unsigned char* buffer = bounce(piece);
                run.within(done, stop, [&](std::size_t i, std::size_t first, std::size_t count) {
                    unsigned char* to = buffer + (i * stride + first - done);
                    run.hashes[i].add(count, to, views.at(i) + first);
                    if (first + count == views.length(i)) std::memset(to + count, 0, stride - views.length(i));
                });
                parts.push_back({buffer, stop - done});
            } else {
                run.within(done, stop, [&](std::size_t i, std::size_t first, std::size_t count) {
                    parts.push_back({views.at(i) + first, count});
                    const bool ends = first + count == views.length(i) && views.length(i) < stride;
                    if (ends) parts.push_back({zeros, stride - views.length(i)});
                });
            }
            error = write_all(fd, parts, at + static_cast<std::int64_t>(done));
            if (gathers) continue;
            run.within(done, stop, [&](std::size_t i, std::size_t, std::size_t count) { run.hashes[i].add(count); });
        }
    }
    if (error != 0) fail(error);
    return run.sums(total);
}

// Checksums of images, which are copied to `into` by the way unless that is empty: then what lies there has them.
nb::list sum_images(const nb::list& images, const std::vector<std::uint64_t>& seeds, const nb::list& into,
                    const std::string& vectors) {
    const Views from(images, false), to(into, true);
    const xxh3::AddBlocks add = xxh3::find_vectors(vectors.c_str());
    if (add == nullptr) throw nb::value_error("this processor lacks those vectors");
    const bool copies = to.count() > 0;
    if (seeds.size() != from.count() || (copies && to.count() != from.count())) throw nb::value_error("no such images");
    for (std::size_t i = 0; i < from.count(); ++i) {
        if (from.length(i) <= 240 || (copies && to.length(i) != from.length(i))) throw nb::value_error("no such image");
    }
    std::vector<std::uint64_t> sums(from.count());
    {
        const nb::gil_scoped_release without;
        const auto some = [&](std::size_t first, std::size_t end) {
            for (std::size_t i = first; i < end; ++i) {
                xxh3::Hash hash(copies ? to.at(i) : from.at(i), from.length(i), seeds[i], add);
                if (copies) {
                    hash.add(from.length(i), to.at(i), from.at(i));
                } else {
                    hash.add(from.length(i));
                }
                sums[i] = hash.digest();
            }
        };
        std::size_t total = 0, half = 0, middle = 0;
        for (std::size_t i = 0; i < from.count(); ++i) total += from.length(i);
        while (middle < from.count() && half < total / 2) half += from.length(middle++);
        std::thread other;
        if (total >= kShared && middle < from.count()) {
            try {
                other = std::thread(some, middle, from.count());
            } catch (const std::system_error&) {  // there may be no more threads
            }
        }
        some(0, other.joinable() ? middle : from.count());
        if (other.joinable()) other.join();
    }
    nb::list found;
    for (const std::uint64_t sum : sums) found.append(sum);
    return found;
}

}  // namespace

}  // namespace rootcellar

NB_MODULE(_slots, m) {
    m.def("read", rootcellar::read_slots, "fd"_a, "at"_a, "stride"_a, "views"_a, "seeds"_a, "piece"_a, "vectors"_a = "");
    m.def("write", rootcellar::write_slots, "fd"_a, "at"_a, "stride"_a, "views"_a, "seeds"_a, "piece"_a, "gathers"_a,
          "vectors"_a = "");
    m.def("sums", rootcellar::sum_images, "images"_a, "seeds"_a, "into"_a, "vectors"_a = "");
}
