//! System call filters: the calls that each kind of thread may make (seccomp(2)).
//!
//! Two filters are stacked; the kernel applies the stricter answer of the two. One ends the process
//! at any call that is not on the list of the thread's kind ([`calls`]). The other answers "no such
//! call" to the few calls that legitimate code tries and can do without.

mod calls;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use calls::When;

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Runs the guest.
    Vcpu,
    /// The main thread, and those it starts.
    EventLoop,
}

/// Installs the filters of `kind` on the calling thread, for good. The thread must have set
/// `no_new_privs`.
pub(super) fn apply(kind: Kind) -> io::Result<()> {
    // The ending filter is installed last, since it does not allow the call that installs another.
    for program in [refusing()?, ending(kind)?] {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// The filter that allows the calls of `kind`, and ends the process at any other.
fn ending(kind: Kind) -> io::Result<BpfProgram> {
    let lists = match kind {
        Kind::Vcpu => [calls::ALL, calls::VCPU],
        Kind::EventLoop => [calls::ALL, calls::EVENT_LOOP],
    };
    let mut rules = BTreeMap::<_, Vec<_>>::new();
    let refused = calls::REFUSED.iter().map(|call| (*call, When::Always));
    for (call, when) in lists.into_iter().flatten().copied().chain(refused) {
        let of_call = rules.entry(call).or_default();
        if let Some(rule) = rule(when)? {
            of_call.push(rule);
        }
    }
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// The filter that refuses some calls, and allows all others.
fn refusing() -> io::Result<BpfProgram> {
    let rules = calls::REFUSED.iter().map(|call| (*call, Vec::new()));
    let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
    compile(rules.collect(), SeccompAction::Allow, refuse)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    listed: SeccompAction,
) -> io::Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64);
    let program = filter.and_then(TryInto::try_into);
    program.map_err(|error| io::Error::other(error.to_string()))
}

/// The rule for a call's arguments; `None` where they do not matter.
fn rule(when: When) -> io::Result<Option<SeccompRule>> {
    use SeccompCmpArgLen::{Dword, Qword};
    let (argument, length, operator, value) = match when {
        When::Always => return Ok(None),
        When::Is(argument, value) => (argument, Dword, SeccompCmpOp::Eq, value),
        When::Null(argument) => (argument, Qword, SeccompCmpOp::Eq, 0),
        When::Bits {
            argument,
            mask,
            value,
        } => (argument, Qword, SeccompCmpOp::MaskedEq(mask), value),
        When::OwnProcess(argument) => {
            let pid = u64::from(std::process::id());
            (argument, Dword, SeccompCmpOp::Eq, pid)
        }
    };
    let rule = SeccompCondition::new(argument, length, operator, value)
        .and_then(|condition| SeccompRule::new(vec![condition]));
    rule.map(Some)
        .map_err(|error| io::Error::other(error.to_string()))
}
