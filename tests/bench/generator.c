/* Posts requests that were made beforehand, and says what was answered and when.
 *
 * generator PORT FILE FIRST CONNECTIONS SECONDS RATE ROUND
 *   FILE   u64 count, count + 1 u64 offsets from the start of the file, then the requests' bytes
 *   FIRST  the first request to use; each further one is used once and in order
 *   RATE   requests per second at an even pace, latency counted from when each was due;
 *          0 for a closed loop: each connection sends its next as soon as it has its answer
 *   ROUND  1 to begin again at FIRST when the file is used up, 0 to end then
 * Prints one JSON object. One thread; no time is spent waiting for anything but the kernel.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull
#define MAX_KINDS 16
#define SLICE_NS (NS / 10)
#define MAX_SLICES 6000
#define TAIL_NS (10 * NS)

typedef struct {
    int fd;
    bool waiting;
    uint64_t due, number;
    size_t sent, got;
    char answer[4096];
} Connection;

typedef struct {
    char what[160];
    uint64_t count;
} Kind;

typedef struct {
    uint32_t *us;
    size_t count, room;
} Latencies;

static const char *file;
static const uint64_t *offsets;
static uint64_t available, first, next_number;
static struct sockaddr_in address = {.sin_family = AF_INET};
static int poller;
static Connection *connections;
static Connection **idle;
static size_t idle_count;
static Kind kinds[MAX_KINDS];
static Latencies good, refused;
static uint64_t slices[MAX_SLICES][3];
static uint64_t began, last_answer, dropped, failed_to_connect, in_hand;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * NS + (uint64_t)time.tv_nsec;
}

static void add(Latencies *all, uint64_t ns) {
    if (all->count == all->room) {
        all->room = all->room ? 2 * all->room : 65536;
        all->us = realloc(all->us, all->room * sizeof *all->us);
        if (!all->us) fail("realloc");
    }
    all->us[all->count++] = (uint32_t)(ns / 1000);
}

static void watch(Connection *one, uint32_t events, int how) {
    struct epoll_event event = {.events = events, .data.ptr = one};
    if (epoll_ctl(poller, how, one->fd, &event)) fail("epoll_ctl");
}

static bool open_connection(Connection *one) {
    int yes = 1;
    one->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (one->fd < 0) fail("socket");
    setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(one->fd, (struct sockaddr *)&address, sizeof address)) {
        failed_to_connect++;
        close(one->fd);
        one->fd = -1;
        return false;
    }
    fcntl(one->fd, F_SETFL, O_NONBLOCK);
    one->waiting = false;
    one->got = 0;
    watch(one, EPOLLIN, EPOLL_CTL_ADD);
    idle[idle_count++] = one;
    return true;
}

static void lose(Connection *one) {
    close(one->fd);
    if (one->waiting) {
        dropped++;
        in_hand--;
    } else {
        for (size_t i = 0; i < idle_count; i++)
            if (idle[i] == one) idle[i--] = idle[--idle_count];
    }
    open_connection(one);
}

static void push(Connection *one) {
    const char *bytes = file + offsets[one->number];
    size_t size = offsets[one->number + 1] - offsets[one->number];
    while (one->sent < size) {
        ssize_t count = send(one->fd, bytes + one->sent, size - one->sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EAGAIN) watch(one, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
            /* Anything else shows when it is read from. */
            return;
        }
        one->sent += (size_t)count;
    }
}

static void begin(uint64_t due) {
    Connection *one = idle[--idle_count];
    one->due = due;
    one->number = next_number++;
    one->sent = one->got = 0;
    one->waiting = true;
    in_hand++;
    push(one);
}

static void count_kind(const char *what, size_t size) {
    if (size >= sizeof kinds[0].what) size = sizeof kinds[0].what - 1;
    for (Kind *kind = kinds; kind < kinds + MAX_KINDS; kind++) {
        if (!kind->count) memcpy(kind->what, what, size);
        if (strlen(kind->what) == size && !memcmp(kind->what, what, size)) {
            kind->count++;
            return;
        }
    }
    kinds[MAX_KINDS - 1].count++;
}

static void note(Connection *one, const char *body, size_t body_size) {
    uint64_t time = now(), slice = (time - began) / SLICE_NS;
    bool is_good = !memcmp(one->answer + 9, "200", 3);
    char what[256];
    int size = snprintf(what, sizeof what, "%.3s %.*s", one->answer + 9, (int)body_size, body);
    count_kind(what, (size_t)size < sizeof what ? (size_t)size : sizeof what - 1);
    add(is_good ? &good : &refused, time - one->due);
    if (slice < MAX_SLICES) {
        slices[slice][is_good ? 0 : 1]++;
        if (is_good && time - one->due > slices[slice][2]) slices[slice][2] = time - one->due;
    }
    last_answer = time;
    one->waiting = false;
    in_hand--;
    idle[idle_count++] = one;
}

/* Reads what there is; a whole answer makes the connection idle again. */
static void pull(Connection *one) {
    ssize_t count = recv(one->fd, one->answer + one->got, sizeof one->answer - 1 - one->got, 0);
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0 || !one->waiting) {
        lose(one);
        return;
    }
    one->got += (size_t)count;
    one->answer[one->got] = 0;
    char *end = strstr(one->answer, "\r\n\r\n");
    if (!end) return;
    char *length = strcasestr(one->answer, "content-length:");
    size_t body_size = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
    if (one->got < (size_t)(end + 4 - one->answer) + body_size) return;
    note(one, end + 4, body_size);
}

static int by_size(const void *a, const void *b) {
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

static void print_latencies(const char *name, Latencies *all) {
    static const double shares[] = {0.5, 0.99, 0.999, 1};
    qsort(all->us, all->count, sizeof *all->us, by_size);
    printf("\"%s\": {\"count\": %zu", name, all->count);
    for (size_t i = 0; i < 4 && all->count; i++) {
        size_t place = (size_t)((double)all->count * shares[i]);
        if (place >= all->count) place = all->count - 1;
        printf(", \"p%g_us\": %u", shares[i] * 100, all->us[place]);
    }
    printf("}, ");
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        if ((unsigned char)*text >= ' ') putchar(*text);
    }
    putchar('"');
}

static void print_all(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{");
    print_latencies("good", &good);
    print_latencies("refused", &refused);
    printf("\"answers\": {");
    for (Kind *kind = kinds; kind < kinds + MAX_KINDS && kind->count; kind++) {
        if (kind != kinds) printf(", ");
        print_text(kind->what);
        printf(": %lu", kind->count);
    }
    printf("}, \"seconds\": %.6f, \"cpu_s\": %.6f, ", (double)(last_answer - began) / 1e9, cpu);
    printf("\"dropped\": %lu, \"unanswered\": %lu, ", dropped, in_hand);
    printf("\"failed_to_connect\": %lu, ", failed_to_connect);
    printf("\"next\": %lu, \"tenths\": [", next_number);
    for (size_t i = 0; i < MAX_SLICES && i * SLICE_NS < last_answer - began; i++)
        printf("%s[%lu, %lu, %lu]", i ? ", " : "", slices[i][0], slices[i][1], slices[i][2] / 1000);
    printf("]}\n");
}

static void open_file(const char *path) {
    struct stat size;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &size)) fail(path);
    file = mmap(NULL, (size_t)size.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (file == MAP_FAILED) fail("mmap");
    available = *(const uint64_t *)file;
    offsets = (const uint64_t *)file + 1;
}

/* Sends what is due at TIME on the connections that are idle; returns when the next one is. */
static uint64_t send_due(uint64_t time, uint64_t ends, double rate, bool round) {
    static uint64_t scheduled;
    while (idle_count) {
        uint64_t due = rate > 0 ? began + (uint64_t)((double)scheduled * 1e9 / rate) : now();
        if (next_number == available && round) next_number = first;
        if (due >= ends || next_number == available) return UINT64_MAX;
        if (due > time && rate > 0) return due;
        begin(due);
        scheduled++;
    }
    return ends;
}

static void wait_until(uint64_t when, size_t count) {
    struct epoll_event events[256];
    uint64_t time = now(), pause = when > time ? when - time : 0;
    struct timespec timeout = {.tv_sec = (time_t)(pause / NS), .tv_nsec = (long)(pause % NS)};
    int ready = epoll_pwait2(poller, events, count < 256 ? (int)count : 256, &timeout, NULL);
    if (ready < 0 && errno != EINTR) fail("epoll_pwait2");
    for (int i = 0; i < ready; i++) {
        Connection *one = events[i].data.ptr;
        if (events[i].events & EPOLLOUT) {
            watch(one, EPOLLIN, EPOLL_CTL_MOD);
            push(one);
        }
        if (events[i].events & ~(uint32_t)EPOLLOUT) pull(one);
    }
}

int main(int count, char **words) {
    if (count != 8) {
        fprintf(stderr, "generator PORT FILE FIRST CONNECTIONS SECONDS RATE ROUND\n");
        return 2;
    }
    address.sin_port = htons((uint16_t)atoi(words[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    open_file(words[2]);
    next_number = first = strtoul(words[3], NULL, 10);
    size_t wanted = strtoul(words[4], NULL, 10);
    double rate = atof(words[6]);
    prctl(PR_SET_TIMERSLACK, 1);
    poller = epoll_create1(0);
    connections = calloc(wanted, sizeof *connections);
    idle = calloc(wanted, sizeof *idle);
    if (poller < 0 || !connections || !idle) fail("start");
    for (size_t i = 0; i < wanted; i++)
        if (!open_connection(connections + i)) fail("connect");
    began = last_answer = now();
    uint64_t ends = began + (uint64_t)(atof(words[5]) * 1e9), time;
    do {
        uint64_t due = send_due(time = now(), ends, rate, atoi(words[7]));
        if (due == UINT64_MAX && !in_hand) break;
        wait_until(due == UINT64_MAX ? time + NS / 10 : due, wanted);
    } while (now() < ends + TAIL_NS);
    print_all();
    return 0;
}
