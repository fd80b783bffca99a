#ifndef VMETTE_STUB_COREFOUNDATION_H
#define VMETTE_STUB_COREFOUNDATION_H

typedef const void *CFTypeRef;
typedef const struct __CFAllocator *CFAllocatorRef;
typedef const struct __attribute__((objc_bridge(NSString))) __CFString *CFStringRef;
typedef struct __attribute__((objc_bridge_mutable(NSError))) __CFError *CFErrorRef;

extern void CFRelease(CFTypeRef object);

#endif
