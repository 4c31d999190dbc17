/* Queries that answer through a pointer and are looked up in several libraries. */
#include <stddef.h>
#include <string.h>

size_t aclGetCompileoptSize(int option) { return 8; }
int aclGetCompileopt(int option, char *value, size_t room) { strncpy(value, "disable", room); return 0; }
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
