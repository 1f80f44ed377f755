//! System call filters: what each kind of thread may ask of the kernel (seccomp(2)).
//!
//! Two filters are stacked, of which the kernel takes the stricter answer. One ends the process at
//! any call that is not on the list of its kind ([`calls`]). The other answers "no such call" to
//! those few that well-meant code tries, and can do without.

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

/// Filters the calling thread, for good. It must have given up new privileges.
pub(super) fn apply(kind: Kind) -> io::Result<()> {
    // The strict one last: it ends the process at the very call that would add another.
    for program in [refusing()?, ending(kind)?] {
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Lets through what `kind` needs, and ends the process at all else.
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

/// Refuses some calls, and lets all others through.
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
