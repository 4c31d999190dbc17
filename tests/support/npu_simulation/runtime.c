/* Stand-in for the part of AscendCL's runtime that torch_npu cannot do without: devices whose memory is the host's.
 *
 * Copies happen at once and every stream has always finished, so nothing is ever waited for. Functions not written here return 0
 * (see libraries.py). SIMULATED_NPUS (default 8) and SIMULATED_NPU_NAME (default Ascend910B1) say which host is pretended.
 * Every function returns 0 for success, as AscendCL's do.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GIB ((size_t)1 << 30)
#define OUT_OF_MEMORY 207001

/* a stream or an event: its number, and when it was last recorded */
typedef struct { int64_t id, nanoseconds; } mark;

static __thread int32_t current_device = 0;
static int64_t marks_made = 0;

static int take(void **where, size_t bytes) { return posix_memalign(where, 512, bytes ? bytes : 512) ? OUT_OF_MEMORY : 0; }
static int make_mark(void **where) {
    mark *made = calloc(1, sizeof(mark));
    made->id = __sync_add_and_fetch(&marks_made, 1);
    *where = made;
    return 0;
}

/* the host */
int aclrtGetDeviceCount(uint32_t *count) {
    const char *said = getenv("SIMULATED_NPUS");
    *count = said ? (uint32_t)atoi(said) : 8;
    return 0;
}
const char *aclrtGetSocName(void) {
    const char *said = getenv("SIMULATED_NPU_NAME");
    return said ? said : "Ascend910B1";
}
int aclsysGetVersionStr(char *package, char *version) { strcpy(version, "9.0.0"); return 0; }
int aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) { *value = 24; return 0; }
int aclrtGetResInCurrentThread(int what, uint32_t *value) { *value = 24; return 0; }
const char *aclGetRecentErrMsg(void) { return NULL; }

/* the device of a thread; a context is a device with a distinct address */
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
int aclrtSetCurrentContext(void *context) { current_device = (int32_t)((intptr_t)context - 0x1000); return 0; }
int aclrtGetCurrentContext(void **context) { *context = (void *)(intptr_t)(0x1000 + current_device); return 0; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return 0;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 1; return 0; }

/* memory */
int aclrtMalloc(void **where, size_t bytes, int policy) { return take(where, bytes); }
int aclrtMallocAlign32(void **where, size_t bytes, int policy) { return take(where, bytes); }
int aclrtMallocHost(void **where, size_t bytes) { return take(where, bytes); }
int aclrtMallocHostWithCfg(void **where, size_t bytes, void *config) { return take(where, bytes); }
int aclrtFree(void *memory) { free(memory); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { memmove(to, from, bytes); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    memmove(to, from, bytes);
    return 0;
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    memmove(to, from, bytes);
    return 0;
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) { memset(to, value, bytes); return 0; }
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *total = 64 * GIB; *unused = 60 * GIB; return 0; }
int aclrtPointerGetAttributes(const void *memory, void *attributes) {
    memset(attributes, 0, 16);
    ((uint32_t *)attributes)[1] = 2; /* neither the host's nor the device's: torch takes pinned memory on its allocator's word */
    return 0;
}

/* streams and events */
int aclrtCreateStream(void **stream) { return make_mark(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return make_mark(stream); }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? (int32_t)((mark *)stream)->id : 0; return 0; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return 0; }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return make_mark(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return make_mark(event); }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return 0; }
int aclrtRecordEvent(void *event, void *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    ((mark *)event)->nanoseconds = now.tv_sec * 1000000000LL + now.tv_nsec;
    return 0;
}
int aclrtEventElapsedTime(float *milliseconds, void *from, void *to) {
    *milliseconds = (((mark *)to)->nanoseconds - ((mark *)from)->nanoseconds) / 1e6f;
    return 0;
}
