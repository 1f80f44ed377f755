//! The filter of system calls: those of a file server with one thread, and no others.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Calls that are allowed with any arguments. Those that take paths lead nowhere but into the
/// directory.
const ALLOWED: &[libc::c_long] = &[
    // The connection.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // Steps into the tree.
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_fchdir,
    // Changes.
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_ftruncate,
    libc::SYS_fchmodat2,
    libc::SYS_utimensat,
    libc::SYS_fsync,
    libc::SYS_syncfs,
    libc::SYS_fstatfs,
    libc::SYS_lgetxattr,
    libc::SYS_lsetxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    // Memory, random numbers and the end.
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls that the C library tries and can do without: paths outside.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_newfstatat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getcwd,
];

/// Installs the filter on this thread, for good.
pub(super) fn apply() -> io::Result<()> {
    let refused = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let nosys = SeccompAction::Errno(libc::ENOSYS as u32);
    let refusing = compile(refused, SeccompAction::Allow, nosys)?;
    let ending = compile(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)?;
    // The ending filter is installed last, since it does not allow the call that installs another.
    for program in [refusing, ending] {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn allowed() -> io::Result<Rules> {
    let any = ALLOWED.iter().chain(REFUSED);
    let mut rules: Rules = any.map(|call| (*call, Vec::new())).collect();
    let exec = libc::PROT_EXEC as u64;
    let no_exec = SeccompCmpOp::MaskedEq(exec);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, no_exec.clone(), 0)?]);
    }
    let duplicate = libc::F_DUPFD_CLOEXEC as u64;
    let flags = libc::F_GETFL as u64;
    let descriptor_flags = libc::F_GETFD as u64;
    let commands = [duplicate, flags, descriptor_flags];
    let commands = commands.map(|command| rule(1, SeccompCmpOp::Eq, command));
    rules.insert(
        libc::SYS_fcntl,
        commands.into_iter().collect::<io::Result<_>>()?,
    );
    // A panic that aborts signals this process alone.
    let own = rule(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    Ok(rules)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> io::Result<SeccompRule> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(io::Error::other)
}

fn compile(rules: Rules, others: SeccompAction, listed: SeccompAction) -> io::Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64);
    let program = filter.and_then(TryInto::try_into);
    program.map_err(|error| io::Error::other(error.to_string()))
}
