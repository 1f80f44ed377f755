//! The packet filter behind our own bridge: address translation, the rules for opening connections,
//! and their number.
//!
//! All rules are in our own table, `inet clone`. Other programs that change the packet filter may
//! remove it, so whenever the kernel announces a change, the table is compared with the one that we
//! made, and made again if it differs ([`is_whole`], [`make`]). Until then no packet passes, since
//! the bridge sends and the host routes only packets that this table marked
//! ([`super::guard::only_filtered`], [`ROUTED_MARK`]). The frames that a single guest may send are
//! decided in [`super::guard`].

mod forward;
mod nft;

use std::fmt::Write as _;

use clone_api::config::NetConfig;

use super::guard::PASSED_MARK;
use super::lease::{Lease, Leases, Ruleset};
use super::range::Range;
use super::ruleset::generation;
use super::{BRIDGE, HostNetError};

/// The bit of a packet's mark that lets it be routed from our bridge.
pub(super) const ROUTED_MARK: u32 = 0x1000_0000;

/// The default limit of a guest's connections in the host's table.
const CONNECTIONS: u32 = NetConfig::DEFAULT_CONNECTIONS;

/// The number of attempts to make the table while another program removes it.
const ATTEMPTS: u32 = 8;

const LIST_TABLE: &str = "list table inet clone";
/// The chain that keeps guests from the host, which the tables of older versions lack.
const TO_HOST: &str = "chain to_host";

/// If the table is as we made it, the notices about other rules that block guests; otherwise
/// `None`.
pub(super) fn whole(leases: &Leases) -> Result<Option<Vec<String>>, HostNetError> {
    let Some(known) = leases.ruleset()? else {
        return Ok(None);
    };
    if known.generation == generation()? && known.table.contains(TO_HOST) {
        return Ok(Some(known.notices));
    }
    if is_whole(leases)? {
        return record(leases);
    }
    Ok(None)
}

/// Whether the table is as we made it. Other programs' tables are not examined.
pub(super) fn is_whole(leases: &Leases) -> Result<bool, HostNetError> {
    let known = leases.ruleset()?.map(|known| known.table);
    let is_of_this_version = known.as_ref().is_some_and(|it| it.contains(TO_HOST));
    Ok(is_of_this_version && known == nft::list(LIST_TABLE)?)
}

/// Makes the table again for `all` guests, and returns notices about other rules that block them.
pub(super) fn make(
    leases: &Leases,
    all: &[Lease],
    range: &Range,
) -> Result<Vec<String>, HostNetError> {
    // A firewall that is starting may remove the table again at once.
    for _ in 0..ATTEMPTS {
        nft::run(&script(all, range), "set up its table")?;
        if let Some(notices) = record(leases)? {
            return Ok(notices);
        }
    }
    Err(HostNetError::Nft {
        action: "keep its table",
        stderr: "something on this host removes it as soon as it is made".to_owned(),
    })
}

/// Lets a guest open connections to the host, or no longer, as its lease says.
pub(super) fn set_reach_host(
    leases: &Leases,
    lease: &Lease,
    all: &[Lease],
    range: &Range,
) -> Result<(), HostNetError> {
    let mut script = String::new();
    push_reach_host(&mut script, "add", lease);
    if !lease.reach_host {
        push_reach_host(&mut script, "delete", lease);
    }
    match nft::run(&script, "change what a guest may reach") {
        Ok(()) => record(leases).map(drop),
        Err(HostNetError::Nft { .. }) => make(leases, all, range).map(drop),
        Err(error) => Err(error),
    }
}

/// Sets the limit of a guest's connections, if its lease does not have the default, and lets it
/// reach the host, if the lease says so.
pub(super) fn admit(
    leases: &Leases,
    lease: &Lease,
    all: &[Lease],
    range: &Range,
) -> Result<(), HostNetError> {
    match change_elements(leases, lease, &["add"]) {
        Err(HostNetError::Nft { .. }) => make(leases, all, range).map(drop),
        result => result,
    }
}

/// Removes what is said of guests that have ended.
pub(super) fn dismiss(leases: &Leases, released: &[Lease]) -> Result<(), HostNetError> {
    for lease in released {
        // The element is added first, so that its deletion succeeds even if it did not exist.
        match change_elements(leases, lease, &["add", "delete"]) {
            // A missing table has no limits to remove.
            Err(HostNetError::Nft { .. }) if nft::list(LIST_TABLE)?.is_none() => {}
            result => result?,
        }
    }
    Ok(())
}

/// Adds or deletes the elements of the table's sets that are about a guest.
fn change_elements(leases: &Leases, lease: &Lease, verbs: &[&str]) -> Result<(), HostNetError> {
    let mut script = String::new();
    for verb in verbs {
        push_limit(&mut script, verb, lease);
        if lease.reach_host {
            push_reach_host(&mut script, verb, lease);
        }
    }
    if script.is_empty() {
        return Ok(());
    }
    nft::run(&script, "change a guest's rules")?;
    record(leases).map(drop)
}

/// Removes the table, if it exists.
pub(super) fn clear(leases: &Leases) -> Result<(), HostNetError> {
    let script = clear_script("bridge") + &clear_script("inet");
    nft::run(&script, "remove its table")?;
    leases.remove_ruleset()
}

/// Records the present state of the packet filter, and returns notices about other rules that block
/// guests; `None` if our table is missing.
fn record(leases: &Leases) -> Result<Option<Vec<String>>, HostNetError> {
    // The generation is read first, so that a later change is detected.
    let generation = generation()?;
    let Some(table) = nft::list(LIST_TABLE)? else {
        return Ok(None);
    };
    let notices = forward::obstacles()?;
    leases.set_ruleset(&Ruleset {
        generation,
        table,
        notices: notices.clone(),
    })?;
    Ok(Some(notices))
}

/// Removes the table with which older versions guarded taps.
pub(super) fn remove_older() -> Result<(), HostNetError> {
    nft::run(
        &clear_script("bridge"),
        "remove the table of an older version",
    )
}

fn clear_script(family: &str) -> String {
    // The table is added first, so that its deletion succeeds even if it did not exist.
    format!("add table {family} clone\ndelete table {family} clone\n")
}

fn script(leases: &[Lease], range: &Range) -> String {
    let mut script = clear_script("bridge") + &clear_script("inet");
    push_table(&mut script, range);
    for lease in leases {
        push_limit(&mut script, "add", lease);
        if lease.reach_host {
            push_reach_host(&mut script, "add", lease);
        }
    }
    script
}

fn push_table(script: &mut String, range: &Range) {
    // Guests may open connections to other networks, and those in `reach_host` to the host's own
    // addresses, where name servers, DHCP and ICMP are open to all. (A packet has its first
    // destination here, before other rules translate it.) The host may open connections to guests,
    // other networks may only answer. Frames that stay on the bridge pass these rules
    // only if br_netfilter is loaded.
    let unrouted = !ROUTED_MARK;
    let _ = write!(
        script,
        "table inet clone {{
  set exempt {{ type ipv4_addr; }}
  set own_limits {{ type ipv4_addr; ct count over {CONNECTIONS}; }}
  set connections {{ type ipv4_addr; size 65535; flags dynamic; }}
  set reach_host {{ type ipv4_addr; }}
  chain to_host {{
    ct state established,related return
    ip saddr @reach_host return
    ip protocol icmp return
    udp dport {{ 53, 67 }} return
    tcp dport 53 return
    drop
  }}
  chain connections {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != {BRIDGE:?} accept
    fib daddr type {{ local, broadcast, anycast, multicast }} jump to_host
    ct state != new accept
    ip saddr @own_limits drop
    ip saddr != @exempt add @connections {{ ip saddr ct count over {CONNECTIONS} }} drop
  }}
  chain routed {{
    type filter hook prerouting priority 300; policy accept;
    iifname {BRIDGE:?} meta mark set meta mark | {ROUTED_MARK:#x}
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname {BRIDGE:?} meta mark set meta mark & {unrouted:#x}
    iifname {BRIDGE:?} tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    oifname {BRIDGE:?} tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    iifname {BRIDGE:?} accept
    oifname {BRIDGE:?} ct state established,related accept
    oifname {BRIDGE:?} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {range} oifname != {BRIDGE:?} masquerade
  }}
  chain passed {{
    type filter hook postrouting priority 300; policy accept;
    oifname {BRIDGE:?} meta mark set {PASSED_MARK:#x}
  }}
}}
"
    );
}

fn push_reach_host(script: &mut String, verb: &str, lease: &Lease) {
    if let Some(address) = lease.address {
        let _ = writeln!(
            script,
            "{verb} element inet clone reach_host {{ {address} }}"
        );
    }
}

fn push_limit(script: &mut String, verb: &str, lease: &Lease) {
    let (Some(address), Some(limit)) = (lease.address, lease.connections) else {
        return;
    };
    let _ = writeln!(
        script,
        "{verb} element inet clone exempt {{ {address} }}\n\
         {verb} element inet clone own_limits {{ {address} ct count over {limit} }}"
    );
}
