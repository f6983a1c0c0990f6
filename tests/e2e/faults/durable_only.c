/* A disk that keeps what was synced, and nothing else.
 *
 * Preloaded into a process, it copies each file below $DURABLE_FROM to the same place below $DURABLE_TO whenever the
 * process syncs it. So $DURABLE_TO is at any time what a loss of power may leave: files as they were at their last
 * sync. Names that are removed are gone at once, which is the worst for whoever still needs them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void make_folders(char *path) {
    for (char *at = path + 1; (at = strchr(at, '/')); *at++ = '/') {
        *at = 0;
        mkdir(path, 0700);
    }
}

/* Where a file is kept; 0: it is not. */
static int kept_at(const char *path, char *kept, size_t room) {
    const char *from = getenv("DURABLE_FROM"), *to = getenv("DURABLE_TO");
    size_t prefix = from ? strlen(from) : 0;
    if (!from || !to || strncmp(path, from, prefix) || path[prefix] != '/')
        return 0;
    snprintf(kept, room, "%s%s", to, path + prefix);
    return 1;
}

static void keep(int handle) {
    static char block[1 << 16], zeros[1 << 16];
    char link[64], path[4096], kept[8192], fresh[8200];
    struct stat facts;
    if (fstat(handle, &facts) || !S_ISREG(facts.st_mode) || !facts.st_nlink)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return;
    path[size] = 0;
    if (!kept_at(path, kept, sizeof kept))
        return;
    pthread_mutex_lock(&lock);
    snprintf(fresh, sizeof fresh, "%s.new", kept);
    make_folders(kept);
    int in = open(link, O_RDONLY | O_CLOEXEC);
    int out = open(fresh, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    off_t at = 0;
    while (in >= 0 && out >= 0 && (size = pread(in, block, sizeof block, at)) > 0) {
        if (memcmp(block, zeros, size) && pwrite(out, block, size, at) != size)
            abort();
        at += size;
    }
    if (in < 0 || out < 0 || size < 0 || ftruncate(out, at) || rename(fresh, kept))
        abort();
    close(in);
    close(out);
    pthread_mutex_unlock(&lock);
}

int fsync(int handle) {
    static int (*real)(int);
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    int status = real(handle);
    if (!status)
        keep(handle);
    return status;
}

int fdatasync(int handle) {
    static int (*real)(int);
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int status = real(handle);
    if (!status)
        keep(handle);
    return status;
}

int unlink(const char *path) {
    static int (*real)(const char *);
    char kept[8192];
    if (!real)
        real = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    if (kept_at(path, kept, sizeof kept))
        real(kept);
    return real(path);
}

int rename(const char *path, const char *to) {
    static int (*real)(const char *, const char *);
    char kept[8192], kept_to[8192];
    if (!real)
        real = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    if (kept_at(path, kept, sizeof kept) && kept_at(to, kept_to, sizeof kept_to))
        real(kept, kept_to);
    return real(path, to);
}
