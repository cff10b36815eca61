/*
 * What a job may ask of the kernel.  All else is refused.
 *
 * The list is what the programs of the environments use, and the runtimes of other languages (Go, the
 * JVM, Node, glibc and musl).  Besides what attacks kernels (io_uring, bpf, userfaultfd, ...) it leaves out
 * what takes memory that no cgroup is charged for, and what is counted for all jobs or for the host's
 * root together:
 *
 *   socket filters, seccomp filters       the kernel has one limit for all compiled BPF; at it nobody's
 *                                         filter can be loaded, a next jobinit's neither
 *   netlink                               what lies in a receive queue is charged to nobody: a job
 *                                         has NETLINK_SOCKETS of these, from jobinit
 *   inotify, fanotify, namespaces         counted for the creator of the user namespace, too: root
 *   io_setup, keys, huge pages            counted for the whole host
 *   multicast groups, memory policies,    small, uncharged, and without a bound that holds
 *   names of mappings
 *   sync, syncfs                          make the whole host wait for its disks
 *
 * What a refused program sees: ENOSYS, as on a kernel without the call, so that libraries use what
 * they used before it was there; EPERM from calls that need privilege on every kernel; for the
 * others the error that the manual has for a limit that is reached, or an option that is not there.
 */
#ifndef CELLBLOCK_SECCOMP_H
#define CELLBLOCK_SECCOMP_H

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
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
enum {
	NR_close_range = 436, NR_openat2 = 437, NR_faccessat2 = 439, NR_epoll_pwait2 = 441,
	NR_futex_waitv = 449, NR_fchmodat2 = 452, NR_mseal = 462,
};

enum rule {
	NO_SUCH_CALL, /* of those not named below */
	ALLOW,
	NOT_PERMITTED,
	NO_INSTANCES,
	LOOK_AT_CLONE,
	LOOK_AT_SOCKET,
	LOOK_AT_SOCKETPAIR,
	LOOK_AT_SETSOCKOPT,
	LOOK_AT_PRCTL,
	LOOK_AT_MMAP,
	LOOK_AT_MEMFD,
	LOOK_AT_SHMGET,
};

#define CALL(name) [__NR_##name] = ALLOW
#define NEW_CALL(name) [NR_##name] = ALLOW
#define REFUSED(name) [__NR_##name] = NOT_PERMITTED

static const unsigned char rules[] = {
	/* Files */
	CALL(read), CALL(write), CALL(readv), CALL(writev), CALL(pread64), CALL(pwrite64), CALL(preadv),
	CALL(pwritev), CALL(preadv2), CALL(pwritev2), CALL(lseek), CALL(openat), NEW_CALL(openat2),
	CALL(close), NEW_CALL(close_range), CALL(dup), CALL(dup3), CALL(fcntl), CALL(ioctl), CALL(flock),
	CALL(fsync), CALL(fdatasync), CALL(sync_file_range), CALL(truncate), CALL(ftruncate),
	CALL(fallocate), CALL(fadvise64), CALL(readahead), CALL(sendfile), CALL(splice), CALL(tee),
	CALL(vmsplice), CALL(copy_file_range), CALL(fstat), CALL(newfstatat), CALL(statx), CALL(statfs),
	CALL(fstatfs), CALL(faccessat), NEW_CALL(faccessat2), CALL(getcwd), CALL(chdir), CALL(fchdir),
	CALL(getdents64), CALL(mkdirat), CALL(mknodat), CALL(unlinkat), CALL(renameat2), CALL(linkat),
	CALL(symlinkat), CALL(readlinkat), CALL(fchmod), CALL(fchmodat), NEW_CALL(fchmodat2),
	CALL(fchown), CALL(fchownat), CALL(umask), CALL(utimensat), CALL(setxattr), CALL(lsetxattr),
	CALL(fsetxattr), CALL(getxattr), CALL(lgetxattr), CALL(fgetxattr), CALL(listxattr),
	CALL(llistxattr), CALL(flistxattr), CALL(removexattr), CALL(lremovexattr), CALL(fremovexattr),
	CALL(pipe2), [__NR_memfd_create] = LOOK_AT_MEMFD,
	/* Waiting */
	CALL(ppoll), CALL(pselect6), CALL(epoll_create1), CALL(epoll_ctl), CALL(epoll_pwait),
	NEW_CALL(epoll_pwait2), CALL(eventfd2), CALL(signalfd4), CALL(timerfd_create),
	CALL(timerfd_settime), CALL(timerfd_gettime), [__NR_inotify_init1] = NO_INSTANCES,
	[__NR_fanotify_init] = NO_INSTANCES,
	/* Memory */
	CALL(brk), [__NR_mmap] = LOOK_AT_MMAP, CALL(munmap), CALL(mremap), CALL(mprotect), CALL(madvise),
	CALL(msync), CALL(mincore), CALL(mlock), CALL(mlock2), CALL(munlock), CALL(mlockall),
	CALL(munlockall), CALL(membarrier), CALL(pkey_mprotect), CALL(pkey_alloc), CALL(pkey_free),
	NEW_CALL(mseal),
	/* Processes; clone3 has its flags in memory, out of a filter's sight: libc falls back to clone. */
	[__NR_clone] = LOOK_AT_CLONE, CALL(execve), CALL(execveat), CALL(exit), CALL(exit_group),
	CALL(wait4), CALL(waitid), CALL(getpid), CALL(getppid), CALL(gettid), CALL(getpgid),
	CALL(setpgid), CALL(getsid), CALL(setsid), CALL(pidfd_open), CALL(pidfd_send_signal),
	CALL(set_tid_address), CALL(set_robust_list), CALL(get_robust_list), CALL(futex),
	NEW_CALL(futex_waitv), CALL(rseq), [__NR_prctl] = LOOK_AT_PRCTL, CALL(ptrace), CALL(personality),
	CALL(restart_syscall),
	/* Whom it runs as: all of it is refused by the kernel, or changes nothing */
	CALL(getuid), CALL(geteuid), CALL(getgid), CALL(getegid), CALL(getresuid), CALL(getresgid),
	CALL(getgroups), CALL(setuid), CALL(setgid), CALL(setreuid), CALL(setregid), CALL(setresuid),
	CALL(setresgid), CALL(setgroups), CALL(setfsuid), CALL(setfsgid), CALL(capget), CALL(capset),
	/* Scheduling and limits */
	CALL(sched_yield), CALL(sched_getparam), CALL(sched_setparam), CALL(sched_getscheduler),
	CALL(sched_setscheduler), CALL(sched_get_priority_max), CALL(sched_get_priority_min),
	CALL(sched_rr_get_interval), CALL(sched_getaffinity), CALL(sched_setaffinity),
	CALL(sched_getattr), CALL(sched_setattr), CALL(getpriority), CALL(setpriority), CALL(ioprio_get),
	CALL(ioprio_set), CALL(getcpu), CALL(prlimit64), CALL(getrlimit), CALL(setrlimit),
	CALL(getrusage), CALL(times), CALL(sysinfo), CALL(uname),
	/* Signals; how many are queued is bounded by RLIMIT_SIGPENDING */
	CALL(kill), CALL(tkill), CALL(tgkill), CALL(rt_sigaction), CALL(rt_sigprocmask),
	CALL(rt_sigpending), CALL(rt_sigsuspend), CALL(rt_sigtimedwait), CALL(rt_sigqueueinfo),
	CALL(rt_tgsigqueueinfo), CALL(rt_sigreturn), CALL(sigaltstack),
	/* Time */
	CALL(clock_gettime), CALL(clock_getres), CALL(clock_nanosleep), CALL(nanosleep),
	CALL(gettimeofday), CALL(getitimer), CALL(setitimer), CALL(timer_create), CALL(timer_settime),
	CALL(timer_gettime), CALL(timer_getoverrun), CALL(timer_delete), CALL(getrandom),
	/* Sockets */
	[__NR_socket] = LOOK_AT_SOCKET, [__NR_socketpair] = LOOK_AT_SOCKETPAIR,
	[__NR_setsockopt] = LOOK_AT_SETSOCKOPT, CALL(getsockopt), CALL(bind), CALL(connect),
	CALL(listen), CALL(accept), CALL(accept4), CALL(getsockname), CALL(getpeername), CALL(sendto),
	CALL(sendmsg), CALL(sendmmsg), CALL(recvfrom), CALL(recvmsg), CALL(recvmmsg), CALL(shutdown),
	/* System V, in a namespace of the jail's own */
	[__NR_shmget] = LOOK_AT_SHMGET, CALL(shmat), CALL(shmdt), CALL(shmctl), CALL(semget),
	CALL(semop), CALL(semtimedop), CALL(semctl), CALL(msgget), CALL(msgsnd), CALL(msgrcv),
	CALL(msgctl),
#if defined(__x86_64__)
	/* What newer architectures have in another form only */
	CALL(open), CALL(creat), CALL(stat), CALL(lstat), CALL(access), CALL(pipe), CALL(dup2),
	CALL(select), CALL(poll), CALL(epoll_create), CALL(epoll_wait), CALL(eventfd), CALL(signalfd),
	CALL(getdents), CALL(mkdir), CALL(rmdir), CALL(mknod), CALL(link), CALL(unlink), CALL(symlink),
	CALL(readlink), CALL(rename), CALL(renameat), CALL(chmod), CALL(chown), CALL(lchown),
	CALL(utime), CALL(utimes), CALL(futimesat), CALL(fork), CALL(vfork), CALL(getpgrp), CALL(pause),
	CALL(alarm), CALL(time), CALL(arch_prctl), [__NR_inotify_init] = NO_INSTANCES,
	REFUSED(iopl), REFUSED(ioperm),
#elif defined(__NR_renameat)
	CALL(renameat),
#endif
	/* Privileged on every kernel */
	REFUSED(unshare), REFUSED(setns), REFUSED(mount), REFUSED(umount2), REFUSED(pivot_root),
	REFUSED(chroot), REFUSED(sethostname), REFUSED(setdomainname), REFUSED(settimeofday),
	REFUSED(clock_settime), REFUSED(adjtimex), REFUSED(clock_adjtime), REFUSED(reboot),
	REFUSED(swapon), REFUSED(swapoff), REFUSED(acct), REFUSED(syslog), REFUSED(vhangup),
	REFUSED(init_module), REFUSED(finit_module), REFUSED(delete_module), REFUSED(kexec_load),
	REFUSED(quotactl), REFUSED(bpf), REFUSED(perf_event_open), REFUSED(open_by_handle_at),
	REFUSED(process_vm_readv), REFUSED(process_vm_writev), REFUSED(kcmp),
};

#define NAMESPACE_FLAGS                                                                            \
	(CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER |             \
	 CLONE_NEWPID | CLONE_NEWNET | 0x80 /* CLONE_NEWTIME */)
enum { TYPE_OF_SOCKET = 0xf }; /* without SOCK_CLOEXEC and SOCK_NONBLOCK */

/* The options that a job may set, by level.  Joining a multicast group is looked at before. */
static const struct options {
	int level;
	unsigned char names[32]; /* the rest are 0, which no level needs */
} options[] = {
	/* Not SO_RCVBUF: see below. */
	{SOL_SOCKET, {SO_REUSEADDR, SO_DONTROUTE, SO_BROADCAST, SO_SNDBUF, SO_KEEPALIVE, SO_OOBINLINE, SO_NO_CHECK,
		      SO_PRIORITY, SO_LINGER, SO_REUSEPORT, SO_PASSCRED, SO_RCVLOWAT, SO_SNDLOWAT,
		      20, 21, /* SO_RCVTIMEO, SO_SNDTIMEO */
		      66, 67, /* SO_RCVTIMEO_NEW, SO_SNDTIMEO_NEW */
		      29, 35, 37, /* SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMPING */
		      SO_BINDTODEVICE, SO_RXQ_OVFL, SO_PEEK_OFF, SO_BUSY_POLL, SO_INCOMING_CPU,
		      76 /* SO_PASSPIDFD */}},
	{IPPROTO_IP, {IP_TOS, IP_TTL, IP_RECVOPTS, IP_RETOPTS, IP_PKTINFO, IP_MTU_DISCOVER, IP_RECVERR, IP_RECVTTL,
		      IP_RECVTOS, IP_FREEBIND, IP_ORIGDSTADDR, IP_BIND_ADDRESS_NO_PORT, IP_MULTICAST_IF,
		      IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_MULTICAST_ALL, 51 /* IP_LOCAL_PORT_RANGE */}},
	{IPPROTO_IPV6, {IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_LOOP,
			IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_RECVERR, IPV6_V6ONLY, IPV6_MULTICAST_ALL, IPV6_RECVPKTINFO,
			IPV6_RECVHOPLIMIT, IPV6_RECVPATHMTU, IPV6_DONTFRAG, IPV6_RECVTCLASS, IPV6_TCLASS,
			IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT, IPV6_FREEBIND}},
	{IPPROTO_TCP, {TCP_NODELAY, TCP_MAXSEG, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_SYNCNT,
		       TCP_LINGER2, TCP_DEFER_ACCEPT, TCP_WINDOW_CLAMP, TCP_QUICKACK, TCP_CONGESTION,
		       TCP_USER_TIMEOUT, TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, TCP_NOTSENT_LOWAT, 36 /* TCP_INQ */}},
	{IPPROTO_UDP, {UDP_CORK, 103 /* UDP_SEGMENT */, 104 /* UDP_GRO */}},
};

static const unsigned prctl_operations[] = {
	PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_GET_KEEPCAPS,
	PR_SET_KEEPCAPS, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP,
	PR_GET_TSC, PR_GET_SECUREBITS, PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, PR_SET_CHILD_SUBREAPER,
	PR_GET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_GET_TID_ADDRESS,
	PR_SET_THP_DISABLE, PR_GET_THP_DISABLE, PR_CAP_AMBIENT, PR_GET_SPECULATION_CTRL,
	PR_SET_SPECULATION_CTRL, PR_SET_PTRACER,
#if defined(__aarch64__)
	PR_SVE_SET_VL, PR_SVE_GET_VL, PR_PAC_RESET_KEYS, PR_SET_TAGGED_ADDR_CTRL,
	PR_GET_TAGGED_ADDR_CTRL, 60 /* PR_PAC_SET_ENABLED_KEYS */, 61 /* PR_PAC_GET_ENABLED_KEYS */,
#endif
};

enum { MAX_FILTER = 1024 };
static struct sock_filter filter[MAX_FILTER];
static unsigned short filter_length;

static void emit(unsigned short code, unsigned value, unsigned char yes, unsigned char no)
{
	if (filter_length < MAX_FILTER)
		filter[filter_length] = (struct sock_filter){code, yes, no, value};
	filter_length++; /* beyond MAX_FILTER: the kernel is asked for too long a filter and refuses */
}

/* The low half of an argument; both architectures are little-endian here. */
static void load_argument(unsigned number)
{
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + number * sizeof(__u64), 0, 0);
}

static void give(unsigned action) { emit(BPF_RET | BPF_K, action, 0, 0); }
static void refuse(unsigned error) { give(SECCOMP_RET_ERRNO | error); }
static void allow(void) { give(SECCOMP_RET_ALLOW); }
/* The `count` instructions that follow are for this value, or for what has one of these bits, only. */
static void if_equal(unsigned value, unsigned char count) { emit(BPF_JMP | BPF_JEQ | BPF_K, value, 0, count); }
static void if_any_bit(unsigned bits, unsigned char count) { emit(BPF_JMP | BPF_JSET | BPF_K, bits, 0, count); }
static void mask(unsigned bits) { emit(BPF_ALU | BPF_AND | BPF_K, bits, 0, 0); }

static void look_at_socket(void)
{
	enum { NETLINK_ROUTE_PROTOCOL = 0 };

	load_argument(0);
	if_equal(AF_UNIX, 1);
	allow();
	/* Libraries look up interfaces with one. */
	if_equal(AF_NETLINK, 4);
	load_argument(2);
	if_equal(NETLINK_ROUTE_PROTOCOL, 1);
	give(SECCOMP_RET_USER_NOTIF);
	refuse(EPROTONOSUPPORT);
	/* The filter goes on for the two families of IP. */
	emit(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 2, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, AF_INET6, 1, 0);
	refuse(EAFNOSUPPORT);
	load_argument(1);
	mask(TYPE_OF_SOCKET);
	if_equal(SOCK_RAW, 1);
	refuse(EPERM);
	if_equal(SOCK_STREAM, 5);
	load_argument(2);
	emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
	if_equal(IPPROTO_TCP, 1);
	allow();
	refuse(EPROTONOSUPPORT);
	/* Echo requests too, which the kernel leaves to the groups in net.ipv4.ping_group_range: by default none. */
	if_equal(SOCK_DGRAM, 7);
	load_argument(2);
	emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 3, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_ICMP, 2, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_ICMPV6, 1, 0);
	if_equal(IPPROTO_UDP, 1);
	allow();
	refuse(EPROTONOSUPPORT);
	refuse(ESOCKTNOSUPPORT);
}

static void look_at_setsockopt(void)
{
	load_argument(1);
	for (unsigned i = 0; i < sizeof options / sizeof options[0]; i++) {
		const struct options *level = &options[i];
		unsigned char count = 0;
		while (count < sizeof level->names && level->names[count])
			count++;
		int joins = level->level == IPPROTO_IP || level->level == IPPROTO_IPV6;
		int socket_level = level->level == SOL_SOCKET;
		if_equal((unsigned)level->level, (unsigned char)(2 * count + 2 + 4 * joins + 2 * socket_level));
		load_argument(2);
		for (unsigned char n = 0; n < count; n++) {
			if_equal(level->names[n], 1);
			allow();
		}
		if (joins) {
			if_equal(level->level == IPPROTO_IP ? IP_ADD_MEMBERSHIP : IPV6_ADD_MEMBERSHIP, 1);
			refuse(ENOBUFS);
			if_equal(MCAST_JOIN_GROUP, 1);
			refuse(ENOBUFS);
		}
		if (socket_level) {
			/* Taken and without effect, as where net.core.rmem_max is the default size: a few
			 * netlink sockets of the default size are little memory. */
			if_equal(SO_RCVBUF, 1);
			refuse(0);
		}
		refuse(ENOPROTOOPT);
	}
	refuse(ENOPROTOOPT);
}

static void look_at(enum rule rule)
{
	switch (rule) {
	case ALLOW:
		allow();
		break;
	case NO_SUCH_CALL:
		refuse(ENOSYS);
		break;
	case NOT_PERMITTED:
		refuse(EPERM);
		break;
	case NO_INSTANCES:
		refuse(EMFILE); /* as at the limit of one user's */
		break;
	case LOOK_AT_CLONE:
		load_argument(0);
		if_any_bit(NAMESPACE_FLAGS, 1);
		refuse(EPERM);
		allow();
		break;
	case LOOK_AT_SOCKET:
		look_at_socket();
		break;
	case LOOK_AT_SOCKETPAIR:
		load_argument(0);
		if_equal(AF_UNIX, 1);
		allow();
		refuse(EAFNOSUPPORT);
		break;
	case LOOK_AT_SETSOCKOPT:
		look_at_setsockopt();
		break;
	case LOOK_AT_PRCTL:
		load_argument(0);
		for (unsigned i = 0; i < sizeof prctl_operations / sizeof prctl_operations[0]; i++) {
			if_equal(prctl_operations[i], 1);
			allow();
		}
		refuse(EINVAL);
		break;
	case LOOK_AT_MMAP:
		load_argument(3);
		if_any_bit(MAP_HUGETLB, 1);
		refuse(ENOMEM);
		allow();
		break;
	case LOOK_AT_MEMFD:
		load_argument(1);
		if_any_bit(MFD_HUGETLB, 1);
		refuse(ENOMEM);
		allow();
		break;
	case LOOK_AT_SHMGET:
		load_argument(2);
		if_any_bit(SHM_HUGETLB, 1);
		refuse(ENOMEM);
		allow();
		break;
	}
}

static void write_filter(void)
{
	enum { CALLS = sizeof rules, X32 = 0x40000000 };
	unsigned first = 0;

	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0);
	give(SECCOMP_RET_KILL_PROCESS);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
	/* Runs of numbers with one rule, upwards; above them are calls newer than this list, and x32's. */
	while (first < CALLS) {
		unsigned beyond = first + 1, jump = filter_length;
		while (beyond < CALLS && rules[beyond] == rules[first])
			beyond++;
		emit(BPF_JMP | BPF_JGE | BPF_K, beyond, 0, 0);
		look_at(rules[first]);
		unsigned length = filter_length - jump - 1u;
		if (length > 255) {
			/* Farther than a condition can jump. */
			filter_length = MAX_FILTER + 1;
			return;
		}
		if (jump < MAX_FILTER)
			filter[jump].jt = (unsigned char)length;
		first = beyond;
	}
	refuse(ENOSYS);
}

/*
 * For the calling process and what it executes; needs no_new_privs.  Returns 0 or an errno.
 * `listener` becomes the descriptor of its notifications, or -1 where a filter further out has one.
 */
static int confine_job(int *listener)
{
	struct sock_fprog program = {.filter = filter};

	write_filter();
	program.len = filter_length;
	*listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (*listener >= 0)
		return 0;
	/* Without one these calls end with ENOSYS. */
	if (errno == EBUSY && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0)
		return 0;
	return errno;
}

#endif
