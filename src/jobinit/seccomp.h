/*
 * What a job may not ask of the kernel, besides what its lack of privilege forbids anyway.
 *
 * A deny list: jobs are arbitrary programs of arbitrary languages.  Each entry closes a way that was
 * used against, or reported by, systems of this kind: nested user namespaces (a wide kernel attack
 * surface), keyrings and vsock (channels between jails), io_uring (goes around this filter),
 * userfaultfd (exploit helper), bpf and perf, raw and packet sockets, file handles, foreign
 * architectures (whose system call numbers would mean something else here).
 */
#ifndef CELLBLOCK_SECCOMP_H
#define CELLBLOCK_SECCOMP_H

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "jobinit knows x86_64 and aarch64 only"
#endif

/* Kernel headers older than these calls lack the numbers; they are the same on both architectures. */
#ifndef __NR_quotactl_fd
#define __NR_quotactl_fd 443
#endif
#ifndef __NR_memfd_secret
#define __NR_memfd_secret 447
#endif
#ifndef __NR_open_tree_attr
#define __NR_open_tree_attr 467
#endif

#define NAMESPACE_FLAGS                                                                            \
	(CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER |             \
	 CLONE_NEWPID | CLONE_NEWNET | 0x80 /* CLONE_NEWTIME */)

/* The low half of an argument; both architectures are little-endian here. */
#define ARGUMENT(n) (offsetof(struct seccomp_data, args) + (n) * sizeof(__u64))
#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (offset))
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, (action))
#define REFUSE(error) RETURN(SECCOMP_RET_ERRNO | (error))
#define IF_EQUAL(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (skip))
#define IF_ANY_BIT(bits, skip) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (bits), 0, (skip))
/* The system call number is in the accumulator until one of the last blocks loads an argument. */
#define DENY(name) IF_EQUAL(__NR_##name, 1), REFUSE(EPERM)

static struct sock_filter job_filter[] = {
	LOAD(offsetof(struct seccomp_data, arch)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0),
	RETURN(SECCOMP_RET_KILL_PROCESS),
	LOAD(offsetof(struct seccomp_data, nr)),
#if defined(__x86_64__)
	/* The x32 ABI has the same architecture code, and a bit in the number. */
	BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1),
	REFUSE(ENOSYS),
	DENY(iopl),
	DENY(ioperm),
	DENY(modify_ldt),
#endif
	/* Namespaces and mounts; clone is looked at below. */
	DENY(unshare),
	DENY(setns),
	DENY(mount),
	DENY(umount2),
	DENY(pivot_root),
	DENY(chroot),
	DENY(fsopen),
	DENY(fsconfig),
	DENY(fsmount),
	DENY(fspick),
	DENY(open_tree),
	DENY(open_tree_attr),
	DENY(move_mount),
	DENY(mount_setattr),
	DENY(name_to_handle_at),
	DENY(open_by_handle_at),
	/* Channels between jails, and ways around this filter. */
	DENY(add_key),
	DENY(keyctl),
	DENY(request_key),
	DENY(io_uring_setup),
	DENY(io_uring_enter),
	DENY(io_uring_register),
	DENY(memfd_secret),
	DENY(io_setup), /* its contexts are counted for the whole host */
	/* Kernel interfaces that a job has no use for and exploits have. */
	DENY(userfaultfd),
	DENY(bpf),
	DENY(perf_event_open),
	DENY(fanotify_init),
	DENY(kcmp),
	DENY(pidfd_getfd),
	DENY(process_vm_readv),
	DENY(process_vm_writev),
	/* The host's own affairs. */
	DENY(syslog),
	DENY(acct),
	DENY(reboot),
	DENY(swapon),
	DENY(swapoff),
	DENY(quotactl),
	DENY(quotactl_fd),
	DENY(init_module),
	DENY(finit_module),
	DENY(delete_module),
	DENY(kexec_load),
	DENY(kexec_file_load),
	DENY(sethostname),
	DENY(setdomainname),
	DENY(settimeofday),
	DENY(clock_settime),
	DENY(adjtimex),
	DENY(clock_adjtime),
	/* clone3 has its flags in memory, out of a filter's sight; libc falls back to clone on ENOSYS. */
	IF_EQUAL(__NR_clone3, 1),
	REFUSE(ENOSYS),
	IF_EQUAL(__NR_clone, 4),
	LOAD(ARGUMENT(0)),
	IF_ANY_BIT(NAMESPACE_FLAGS, 1),
	REFUSE(EPERM),
	RETURN(SECCOMP_RET_ALLOW),
	IF_EQUAL(__NR_socket, 17),
	LOAD(ARGUMENT(0)),
	/* libc looks up interfaces with a raw route socket; buffers of other kinds are nobody's memory. */
	IF_EQUAL(AF_NETLINK, 4),
	LOAD(ARGUMENT(2)),
	IF_EQUAL(0 /* NETLINK_ROUTE */, 1),
	RETURN(SECCOMP_RET_ALLOW),
	REFUSE(EPERM),
	IF_EQUAL(AF_VSOCK, 1),
	REFUSE(EAFNOSUPPORT),
	IF_EQUAL(AF_ALG, 1),
	REFUSE(EAFNOSUPPORT),
	IF_EQUAL(AF_PACKET, 1),
	REFUSE(EPERM),
	LOAD(ARGUMENT(1)),
	BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xf), /* without SOCK_CLOEXEC and SOCK_NONBLOCK */
	IF_EQUAL(SOCK_RAW, 1),
	REFUSE(EPERM),
	RETURN(SECCOMP_RET_ALLOW),
	RETURN(SECCOMP_RET_ALLOW),
};

/* For the calling process and what it executes; needs no_new_privs.  Returns 0 or an errno. */
static int confine_job(void)
{
	struct sock_fprog program = {
		.len = sizeof job_filter / sizeof job_filter[0],
		.filter = job_filter,
	};
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
		return errno;
	return 0;
}

#endif
