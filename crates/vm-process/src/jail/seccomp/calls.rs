//! The lists of allowed system calls and their arguments. A filter does not check which descriptor
//! a call acts on: the process has only descriptors that were opened before the jail, or accepted
//! in it.
//!
//! Entries of the same call are alternatives. Either all of them have a condition or none has.

use libc::c_long;

/// A system call, and the condition under which it is allowed.
pub(super) type Allowed = (c_long, When);

/// A condition on a call's arguments, which are numbered from 0.
#[derive(Debug, Clone, Copy)]
pub(super) enum When {
    /// The call is allowed with any arguments.
    Always,
    /// The argument's lower 32 bits have this value.
    Is(u8, u64),
    /// The pointer is null.
    Null(u8),
    /// The argument's bits in `mask` equal `value`.
    Bits { argument: u8, mask: u64, value: u64 },
    /// The argument is this process's id.
    OwnProcess(u8),
}

use When::{Always, Bits, Is, Null, OwnProcess};

/// Calls that the C library or our code tries, and that each has a fallback for: paths (the jail
/// has none), and `clone3`, whose flags a filter cannot inspect.
pub(super) const REFUSED: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getcwd,
    libc::SYS_clone3,
];

const fn without_exec(call: c_long) -> Allowed {
    let exec = libc::PROT_EXEC as u64;
    (
        call,
        Bits {
            argument: 2,
            mask: exec,
            value: 0,
        },
    )
}

/// An ioctl by its type and number; its size is left to the kernel.
const fn ioctl(kind: u8, number: u8) -> Allowed {
    (
        libc::SYS_ioctl,
        Bits {
            argument: 1,
            mask: 0xFFFF,
            value: (kind as u64) << 8 | number as u64,
        },
    )
}

const KVM: u8 = 0xAE;
const TUN: u8 = b'T';
const VHOST: u8 = 0xAF;
const BLOCK: u8 = 0x12;
const USERFAULT: u8 = 0xAA;
const PAGEMAP: u8 = b'f';
/// linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: u64 = 1;

/// The calls that every thread needs: memory, locks, time, signals, and the device set-up that the
/// guest triggers, which happens on any thread.
pub(super) const ALL: &[Allowed] = &[
    // Memory. No new mapping may be executable.
    (libc::SYS_brk, Always),
    without_exec(libc::SYS_mmap),
    without_exec(libc::SYS_mprotect),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    (libc::SYS_madvise, Always),
    // Locks and threads.
    (libc::SYS_futex, Always),
    (libc::SYS_sched_yield, Always),
    (libc::SYS_sched_getaffinity, Always),
    (libc::SYS_membarrier, Always),
    (libc::SYS_rseq, Always),
    (libc::SYS_set_robust_list, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_getpid, Always),
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
    // Signals, to threads of this process.
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_rt_sigaction, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_tgkill, OwnProcess(0)),
    // Clocks and random numbers.
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_nanosleep, Always),
    (libc::SYS_gettimeofday, Always),
    (libc::SYS_getrandom, Always),
    // Descriptors.
    (libc::SYS_read, Always),
    (libc::SYS_readv, Always),
    (libc::SYS_pread64, Always),
    (libc::SYS_preadv, Always),
    (libc::SYS_preadv2, Always),
    (libc::SYS_write, Always),
    (libc::SYS_writev, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_pwritev, Always),
    (libc::SYS_pwritev2, Always),
    (libc::SYS_close, Always),
    (libc::SYS_shutdown, Always),
    // Activating a device duplicates its eventfds.
    (libc::SYS_fcntl, Is(1, libc::F_GETFL as u64)),
    (libc::SYS_fcntl, Is(1, libc::F_SETFL as u64)),
    (libc::SYS_fcntl, Is(1, libc::F_GETFD as u64)),
    (libc::SYS_fcntl, Is(1, libc::F_SETFD as u64)),
    (libc::SYS_fcntl, Is(1, libc::F_DUPFD_CLOEXEC as u64)),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_poll, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_eventfd2, Always),
    (libc::SYS_timerfd_settime, Always),
    (libc::SYS_timerfd_gettime, Always),
    (libc::SYS_io_uring_enter, Always),
    // Interrupts and doorbells: IRQFD, IOEVENTFD, SET_GSI_ROUTING, SIGNAL_MSI.
    ioctl(KVM, 0x76),
    ioctl(KVM, 0x79),
    ioctl(KVM, 0x6A),
    ioctl(KVM, 0xA5),
    // TUNSETOFFLOAD, TUNSETQUEUE, TUNGETIFF, TUNSETVNETHDRSZ.
    ioctl(TUN, 208),
    ioctl(TUN, 217),
    ioctl(TUN, 210),
    ioctl(TUN, 216),
    // VHOST_{GET,SET}_FEATURES, SET_MEM_TABLE.
    ioctl(VHOST, 0x00),
    ioctl(VHOST, 0x03),
    // VHOST_SET_VRING_{NUM,ADDR}, {GET,SET}_VRING_BASE, SET_VRING_{KICK,CALL,ERR}.
    ioctl(VHOST, 0x10),
    ioctl(VHOST, 0x11),
    ioctl(VHOST, 0x12),
    ioctl(VHOST, 0x20),
    ioctl(VHOST, 0x21),
    ioctl(VHOST, 0x22),
    // VHOST_NET_SET_BACKEND.
    ioctl(VHOST, 0x30),
];

/// The calls that a vCPU's thread needs besides [`ALL`]: its state in KVM.
pub(super) const VCPU: &[Allowed] = &[
    // RUN; {GET,SET}_{REGS,SREGS,MSRS,FPU,LAPIC,CPUID2}.
    ioctl(KVM, 0x80),
    ioctl(KVM, 0x81),
    ioctl(KVM, 0x82),
    ioctl(KVM, 0x83),
    ioctl(KVM, 0x84),
    ioctl(KVM, 0x88),
    ioctl(KVM, 0x89),
    ioctl(KVM, 0x8C),
    ioctl(KVM, 0x8D),
    ioctl(KVM, 0x8E),
    ioctl(KVM, 0x8F),
    ioctl(KVM, 0x90),
    ioctl(KVM, 0x91),
    // {GET,SET}_{MP_STATE,VCPU_EVENTS,DEBUGREGS,XSAVE,XCRS,TSC_KHZ}; SET_XSAVE is above, as
    // SIGNAL_MSI has the same number.
    ioctl(KVM, 0x98),
    ioctl(KVM, 0x99),
    ioctl(KVM, 0x9F),
    ioctl(KVM, 0xA0),
    ioctl(KVM, 0xA1),
    ioctl(KVM, 0xA2),
    ioctl(KVM, 0xA3),
    ioctl(KVM, 0xA4),
    ioctl(KVM, 0xA6),
    ioctl(KVM, 0xA7),
    // PRE_FAULT_MEMORY.
    ioctl(KVM, 0xD5),
    // KVMCLOCK_CTRL, GET_XSAVE2.
    ioctl(KVM, 0xAD),
    ioctl(KVM, 0xCF),
];

/// The calls that the event loop, and the disks' threads that it starts, need besides [`ALL`]:
/// waiting, its clients, and files.
pub(super) const EVENT_LOOP: &[Allowed] = &[
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_pwait2, Always),
    // Clients of the sockets that the process listens on. Nothing is sent to an address.
    (libc::SYS_accept4, Always),
    (libc::SYS_recvfrom, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendto, Null(4)),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_getsockopt, Always),
    (libc::SYS_ioctl, Is(1, libc::FIONBIO)),
    // Disks and logs.
    (libc::SYS_fsync, Always),
    (libc::SYS_fdatasync, Always),
    (libc::SYS_fallocate, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_copy_file_range, Always),
    (libc::SYS_flock, Always),
    (libc::SYS_fstat, Always),
    (libc::SYS_fstatfs, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_statx, Always),
    // BLKSSZGET, BLKGETSIZE64.
    ioctl(BLOCK, 104),
    ioctl(BLOCK, 114),
    // Snapshots: changed pages are found by asynchronous write protection (UFFDIO_API, REGISTER,
    // UNREGISTER, WRITEPROTECT) and by the page tables (PAGEMAP_SCAN).
    (
        libc::SYS_userfaultfd,
        Bits {
            argument: 0,
            mask: UFFD_USER_MODE_ONLY,
            value: UFFD_USER_MODE_ONLY,
        },
    ),
    ioctl(USERFAULT, 0x3F),
    ioctl(USERFAULT, 0x00),
    ioctl(USERFAULT, 0x01),
    ioctl(USERFAULT, 0x06),
    ioctl(PAGEMAP, 16),
    // {GET,SET}_CLOCK, SET_USER_MEMORY_REGION, GET_DIRTY_LOG.
    ioctl(KVM, 0x7B),
    ioctl(KVM, 0x7C),
    ioctl(KVM, 0x46),
    ioctl(KVM, 0x42),
    // Threads, never processes nor namespaces.
    (
        libc::SYS_clone,
        Bits {
            argument: 0,
            mask: THREAD | NAMESPACES,
            value: THREAD,
        },
    ),
    (libc::SYS_prctl, Is(0, libc::PR_SET_NAME as u64)),
    // The report to the launcher, after which the VM no longer ends with it.
    (libc::SYS_prctl, Is(0, libc::PR_SET_PDEATHSIG as u64)),
    (libc::SYS_pipe2, Always),
    (libc::SYS_dup2, Always),
    (libc::SYS_dup3, Always),
    // The VM's CPU statistics.
    (libc::SYS_getrusage, Always),
];

const THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
