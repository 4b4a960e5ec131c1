// Memory whose bytes are followed by a page that nobody may touch, or follow one: a wrong access ends the program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

class Fenced {
public:
    enum class At { Begin, End };

    Fenced(size_t size, At at) : size_(size) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (size + page - 1) / page * page;
        mapped_ = room + 2 * page;
        void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) throw std::bad_alloc();
        pages_ = static_cast<uint8_t*>(pages);
        if (room > 0 && mprotect(pages_ + page, room, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
        data_ = pages_ + page + (at == At::End ? room - size : 0);
    }
    ~Fenced() {
        if (pages_ != nullptr) munmap(pages_, mapped_);
    }
    Fenced(Fenced&& other) noexcept
        : pages_(other.pages_), mapped_(other.mapped_), data_(other.data_), size_(other.size_) {
        other.pages_ = nullptr;
    }
    Fenced(const Fenced&) = delete;
    Fenced& operator=(const Fenced&) = delete;

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

private:
    uint8_t* pages_ = nullptr;
    size_t mapped_ = 0;
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};
