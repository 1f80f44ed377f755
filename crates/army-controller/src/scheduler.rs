//! Chooses hosts for VMs: it filters hosts, and then scores them. It works on plain data.
//!
//! Memory counts by the private memory of VMs as measured, and not by their nominal size, because
//! clones share most of it. A host that was just given VMs is charged for them at once, by the cost
//! of other VMs of their template, until it is measured again. An operator can limit the nominal size
//! of all VMs of a host, too. Whatever puts a VM on a host is filtered here.

use std::collections::BTreeSet;

use crate::error::RETRY_S;
use crate::{Error, ErrorKind, Result};

/// The memory of a host that is kept free: one part in so many of all of it.
const RESERVE: u64 = 10;
/// The space that must be free on a host's disk and in its runtime directory besides what a VM is
/// known to need, in bytes.
const FREE_SPACE: u64 = 64 << 20;
/// The assumed cost of a clone where none of its template was measured yet, in bytes.
pub const UNKNOWN_COST: u64 = 64 << 20;
/// What it adds to a host's score that it has the template, and that a standby is ready: the host
/// may be that much fuller than others, as a share of its memory. With more, the VMs of a template
/// would gather on its first host; `cargo xtask bench place` shows how evenly hosts are used.
const TEMPLATE_BONUS: f64 = 0.02;
const STANDBY_BONUS: f64 = 0.02;

/// A host, as the scheduler sees it.
#[derive(Debug, Clone, Default)]
pub struct HostView {
    /// The host's name.
    pub name: String,
    /// Whether the host accepts VMs.
    pub open: bool,
    /// Whether the host has the labels that the request requires.
    pub suits: bool,
    /// The names of the CPU features that the VMs need and the host lacks.
    pub lacks: Vec<String>,
    /// The number of processors.
    pub cpus: u32,
    /// The number of runnable tasks, in thousandths.
    pub load_milli: u32,
    /// All memory, in bytes.
    pub memory_bytes: u64,
    /// The memory that is available, less what was given away since it was measured, in bytes.
    pub available_bytes: u64,
    /// The nominal memory of all VMs on the host, in bytes.
    pub promised_bytes: u64,
    /// The most nominal memory that the VMs of the host may have together, in bytes; `None` where
    /// there is no limit.
    pub promise_limit_bytes: Option<u64>,
    /// The free space of the disk with the templates, in bytes; `None` where it is not known.
    pub disk_free_bytes: Option<u64>,
    /// The free space of the runtime directory, in bytes; `None` where it is not known.
    pub run_free_bytes: Option<u64>,
    /// The number of VMs on the host.
    pub vms: u32,
    /// Whether the host has the template.
    pub has_template: bool,
    /// The number of standbys of the template that are ready.
    pub ready: u32,
}

/// What each VM of a request needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Need {
    /// The private memory that a VM is expected to have, in bytes.
    pub cost_bytes: u64,
    /// The memory size of a VM, in bytes.
    pub nominal_bytes: u64,
    /// The disk space that the template takes on a host that does not have it yet, in bytes.
    pub template_bytes: u64,
    /// Whether a host without the template can be chosen.
    pub anywhere: bool,
}

/// Chooses a host for each of `count` VMs, and charges the host for it. Returns indices of `hosts`.
///
/// # Errors
/// [`ErrorKind::Busy`] where there is no room for all of them, [`ErrorKind::HostUnsupported`]
/// where no host has the CPU features, and [`ErrorKind::HostUnavailable`] where those that have
/// them accept no VMs. Then no VM is placed.
pub fn place(hosts: &mut [HostView], need: Need, count: u32) -> Result<Vec<usize>> {
    // The hosts that were charged, as they were before.
    let mut before: Vec<(usize, HostView)> = Vec::new();
    let mut chosen = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let best = hosts
            .iter()
            .enumerate()
            .filter(|(_, host)| fits(host, need))
            .max_by(|(_, a), (_, b)| score(a).total_cmp(&score(b)));
        let Some((index, _)) = best else {
            let error = refusal(hosts, need, count, chosen.len());
            for (index, host) in before.into_iter().rev() {
                hosts[index] = host;
            }
            return Err(error);
        };
        before.push((index, hosts[index].clone()));
        charge(&mut hosts[index], need);
        chosen.push(index);
    }
    Ok(chosen)
}

fn fits(host: &HostView, need: Need) -> bool {
    host.open
        && host.suits
        && host.lacks.is_empty()
        && (host.has_template || need.anywhere)
        && shortage(host, need).is_none()
}

/// What a host does not have enough of for one more VM.
fn shortage(host: &HostView, need: Need) -> Option<&'static str> {
    let template_bytes = match host.has_template {
        true => 0,
        false => need.template_bytes,
    };
    let disk_bytes = template_bytes.saturating_add(FREE_SPACE);
    let promised = host.promised_bytes.saturating_add(need.nominal_bytes);
    if host.available_bytes < need.cost_bytes.saturating_add(host.memory_bytes / RESERVE) {
        Some("memory")
    } else if host
        .promise_limit_bytes
        .is_some_and(|limit| promised > limit)
    {
        Some("memory that may be promised (--memory-promise)")
    } else if host.disk_free_bytes.is_some_and(|free| free < disk_bytes) {
        Some("space on the disk with the templates")
    } else if host.run_free_bytes.is_some_and(|free| free < FREE_SPACE) {
        Some("space in the runtime directory")
    } else {
        None
    }
}

/// The score of a host, where more is better: its shares of free memory and of idle processors, and
/// whether the template and a standby are there.
fn score(host: &HostView) -> f64 {
    let free = host.available_bytes as f64 / host.memory_bytes.max(1) as f64;
    let busy = f64::from(host.load_milli) / 1000.0 / f64::from(host.cpus.max(1));
    let crowd = f64::from(host.vms) / f64::from(host.cpus.max(1)) / 1000.0;
    let mut score = free - 0.5 * busy.min(2.0) - crowd;
    if host.has_template {
        score += TEMPLATE_BONUS;
    }
    if host.ready > 0 {
        score += STANDBY_BONUS;
    }
    score
}

fn charge(host: &mut HostView, need: Need) {
    host.available_bytes = host.available_bytes.saturating_sub(need.cost_bytes);
    host.promised_bytes = host.promised_bytes.saturating_add(need.nominal_bytes);
    host.vms += 1;
    host.ready = host.ready.saturating_sub(1);
}

fn refusal(hosts: &[HostView], need: Need, count: u32, placed: usize) -> Error {
    if let Some(error) = unsupported(hosts) {
        return error;
    }
    let open = hosts.iter().filter(|host| host.open).count();
    let message = if open == 0 {
        "no host takes VMs now: all are drained, or do not answer".to_owned()
    } else if !hosts.iter().any(|host| host.open && host.suits) {
        "no host with these labels takes VMs now".to_owned()
    } else if !need.anywhere && !hosts.iter().any(|host| host.open && host.has_template) {
        "no host that has the template takes VMs now".to_owned()
    } else {
        let fitting = hosts.iter().filter(|host| host.open && host.suits);
        let short: BTreeSet<_> = fitting.filter_map(|host| shortage(host, need)).collect();
        let short: Vec<_> = short.into_iter().collect();
        let short = match short.as_slice() {
            [] => "room".to_owned(),
            short => short.join(", and elsewhere "),
        };
        format!("there is {short} for {placed} of the {count} VMs only")
    };
    Error::new(ErrorKind::Busy, message)
        .advise("try again later, destroy VMs, or add a host")
        .retry_after(RETRY_S)
}

/// The error where hosts lack CPU features: all of them, or those that accept VMs now.
fn unsupported(hosts: &[HostView]) -> Option<Error> {
    let suiting = || hosts.iter().filter(|host| host.suits);
    let nearest = |of: &mut dyn Iterator<Item = &HostView>| {
        let nearest = of.min_by_key(|host| host.lacks.len())?;
        (!nearest.lacks.is_empty()).then(|| {
            let lacks = nearest.lacks.join(", ");
            format!("{} lacks {lacks}", nearest.name)
        })
    };
    if let Some(lacks) = nearest(&mut suiting()) {
        let message = format!("no host can run these VMs: {lacks}");
        return Some(Error::new(ErrorKind::HostUnsupported, message).advise(
            "add a host whose CPU has them, or take the template on a CPU that all hosts match",
        ));
    }
    let lacks = nearest(&mut suiting().filter(|host| host.open))?;
    let message = format!("the hosts that may be able to run these VMs take none now: {lacks}");
    Some(
        Error::new(ErrorKind::HostUnavailable, message)
            .advise("try again when they answer and are not drained, or add a host")
            .retry_after(RETRY_S),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host(name: &str) -> HostView {
        HostView {
            name: name.to_owned(),
            open: true,
            suits: true,
            cpus: 8,
            memory_bytes: 64 * GIB,
            available_bytes: 60 * GIB,
            has_template: true,
            ..HostView::default()
        }
    }

    fn need(cost_bytes: u64) -> Need {
        Need {
            cost_bytes,
            ..Need::default()
        }
    }

    #[test]
    fn vms_spread_over_hosts_that_are_alike() {
        let mut hosts = ["a", "b", "c"].map(host);
        place(&mut hosts, need(GIB), 30).unwrap();
        assert_eq!(hosts.map(|host| host.vms), [10, 10, 10]);
    }

    #[test]
    fn what_a_host_promised_does_not_count_and_what_it_has_does() {
        let mut full = host("full");
        full.available_bytes = 7 * GIB;
        let mut hosts = [full, host("free")];
        assert_eq!(place(&mut hosts, need(GIB), 1).unwrap(), [1]);
        // A tenth is kept back.
        hosts[1].open = false;
        let error = place(&mut hosts, need(GIB), 1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert_eq!(error.retry_after_s, Some(5));
    }

    #[test]
    fn what_a_host_is_short_of_is_named() {
        let short = |change: fn(&mut HostView)| {
            let mut hosts = [host("a")];
            change(&mut hosts[0]);
            let need = Need {
                cost_bytes: GIB,
                nominal_bytes: 4 * GIB,
                template_bytes: GIB,
                anywhere: true,
            };
            place(&mut hosts, need, 1).map_err(|error| error.message)
        };
        let is_short = |change, of: &str| {
            let message = short(change).unwrap_err();
            assert!(message.contains(of), "{message}");
        };
        is_short(|host| host.available_bytes = GIB, "memory");
        is_short(
            |host| host.run_free_bytes = Some(1 << 20),
            "runtime directory",
        );
        is_short(|host| host.disk_free_bytes = Some(1 << 20), "disk");
        is_short(
            |host| {
                host.promised_bytes = 62 * GIB;
                host.promise_limit_bytes = Some(64 * GIB);
            },
            "promised",
        );
        // A template that has to be copied takes its space.
        is_short(
            |host| {
                host.has_template = false;
                host.disk_free_bytes = Some(GIB);
            },
            "disk",
        );
        short(|host| host.disk_free_bytes = Some(GIB)).unwrap();
        // A host that does not say is not refused.
        short(|_| {}).unwrap();
    }

    #[test]
    fn all_are_placed_or_none() {
        let mut hosts = [host("a")];
        let before = hosts[0].available_bytes;
        assert!(place(&mut hosts, need(GIB), 1000).is_err());
        assert_eq!((hosts[0].available_bytes, hosts[0].vms), (before, 0));
    }

    #[test]
    fn a_standby_attracts_vms_and_a_drained_host_gets_none() {
        let mut warm = host("warm");
        warm.ready = 1;
        warm.available_bytes -= GIB;
        let mut drained = host("drained");
        drained.open = false;
        drained.available_bytes = 64 * GIB;
        let mut hosts = [host("cold"), warm, drained];
        let chosen = place(&mut hosts, need(GIB), 2).unwrap();
        assert_eq!(chosen, [1, 0]);
    }

    #[test]
    fn hosts_that_lack_a_cpu_feature_get_no_vms() {
        let mut old = host("old");
        old.lacks = vec!["avx512f".to_owned()];
        old.ready = 5;
        let mut new = host("new");
        new.available_bytes = 20 * GIB;
        let mut hosts = [old, new];
        assert_eq!(place(&mut hosts, need(GIB), 2).unwrap(), [1, 1]);
    }

    #[test]
    fn a_feature_that_no_host_has_is_named_and_not_worth_waiting_for() {
        let mut hosts = [host("a"), host("b")];
        hosts[0].lacks = vec!["avx2".to_owned(), "avx512f".to_owned()];
        hosts[1].lacks = vec!["avx512f".to_owned()];
        hosts[1].open = false;
        let error = place(&mut hosts, need(GIB), 1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::HostUnsupported);
        assert_eq!(error.retry_after_s, None);
        assert!(error.message.ends_with("b lacks avx512f"), "{error}");
    }

    #[test]
    fn a_feature_of_hosts_that_are_away_is_named_and_worth_waiting_for() {
        let mut hosts = [host("old"), host("away"), host("elsewhere")];
        hosts[0].lacks = vec!["avx512f".to_owned()];
        hosts[1].open = false;
        // The host has another label, so it does not count.
        hosts[2].suits = false;
        let error = place(&mut hosts, need(GIB), 1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::HostUnavailable);
        assert_eq!(error.retry_after_s, Some(5));
        assert!(error.message.contains("old lacks avx512f"), "{error}");
        // A host that has the features but no room is another case.
        hosts[1].open = true;
        let error = place(&mut hosts, need(100 * GIB), 1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
    }

    #[test]
    fn the_refusal_says_which_filter_it_was() {
        let mut closed = [host("a")];
        closed[0].open = false;
        let detail = |hosts: &mut [HostView]| place(hosts, need(1), 1).unwrap_err().message;
        assert!(detail(&mut closed).contains("drained"));
        let mut without = [host("a")];
        without[0].has_template = false;
        assert!(detail(&mut without).contains("template"));
    }

    #[test]
    fn many_placements_keep_the_hosts_within_a_few_percent_of_each_other() {
        let mut hosts: Vec<HostView> = (0..50).map(|n| host(&n.to_string())).collect();
        // The costs differ, in an order that repeats itself late.
        for number in 0..5000_u64 {
            let cost = (1 + number * 7919 % 13) << 22;
            place(&mut hosts, need(cost), 1).unwrap();
        }
        let free: Vec<u64> = hosts.iter().map(|host| host.available_bytes).collect();
        let (least, most) = (free.iter().min().unwrap(), free.iter().max().unwrap());
        assert!((most - least) * 100 / most <= 3, "{least} to {most}");
    }
}
