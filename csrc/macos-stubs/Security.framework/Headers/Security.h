#ifndef VMETTE_STUB_SECURITY_H
#define VMETTE_STUB_SECURITY_H

#include <CoreFoundation/CoreFoundation.h>

typedef struct __attribute__((objc_bridge(id))) __SecTask *SecTaskRef;

extern SecTaskRef SecTaskCreateFromSelf(CFAllocatorRef allocator);
extern CFTypeRef SecTaskCopyValueForEntitlement(SecTaskRef task, CFStringRef entitlement, CFErrorRef *error)
    __attribute__((cf_returns_retained));

#endif
