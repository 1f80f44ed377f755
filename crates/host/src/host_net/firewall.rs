//! The packet filter behind the bridge of our own: address translation, who may open connections,
//! and how many.
//!
//! All of it is in the table `inet clone`, which is ours alone. Whoever else changes the packet
//! filter may remove it, so it is compared with what we made whenever the kernel says that anything
//! changed, and made again where it differs ([`is_whole`], [`make`]). In between nothing passes,
//! since the bridge sends and the host routes only what this table marked
//! ([`super::guard::only_filtered`], [`ROUTED_MARK`]). What single guests may send is not decided
//! here ([`super::guard`]).

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

/// The most connections that a guest has in the host's table unless its lease says otherwise.
const CONNECTIONS: u32 = NetConfig::DEFAULT_CONNECTIONS;

/// How often the table is made while something else removes it.
const ATTEMPTS: u32 = 8;

const LIST_TABLE: &str = "list table inet clone";

/// Whether the table is there as we made it: then what stands in the guests' way, else `None`.
pub(super) fn whole(leases: &Leases) -> Result<Option<Vec<String>>, HostNetError> {
    let Some(known) = leases.ruleset()? else {
        return Ok(None);
    };
    if known.generation == generation()? {
        return Ok(Some(known.notices));
    }
    if is_whole(leases)? {
        return record(leases);
    }
    Ok(None)
}

/// Whether the table is there as we made it, without a look at those of others.
pub(super) fn is_whole(leases: &Leases) -> Result<bool, HostNetError> {
    let known = leases.ruleset()?.map(|known| known.table);
    Ok(known.is_some() && known == nft::list(LIST_TABLE)?)
}

/// Makes the table anew for `all` guests, and returns what stands in their way.
pub(super) fn make(
    leases: &Leases,
    all: &[Lease],
    range: &Range,
) -> Result<Vec<String>, HostNetError> {
    // A firewall that is just starting may remove the table again at once.
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

/// Lets a guest have the number of connections that its lease says, where that is not the default.
pub(super) fn admit(
    leases: &Leases,
    lease: &Lease,
    all: &[Lease],
    range: &Range,
) -> Result<(), HostNetError> {
    match change_limit(leases, lease, &["add"]) {
        Err(HostNetError::Nft { .. }) => make(leases, all, range).map(drop),
        result => result,
    }
}

/// Forgets the numbers of connections of guests that are gone.
pub(super) fn dismiss(leases: &Leases, gone: &[Lease]) -> Result<(), HostNetError> {
    for lease in gone {
        // Adding first makes the deletion succeed for an element that is not there.
        match change_limit(leases, lease, &["add", "delete"]) {
            // Without the table there is nothing to forget.
            Err(HostNetError::Nft { .. }) if nft::list(LIST_TABLE)?.is_none() => {}
            result => result?,
        }
    }
    Ok(())
}

fn change_limit(leases: &Leases, lease: &Lease, verbs: &[&str]) -> Result<(), HostNetError> {
    let mut script = String::new();
    for verb in verbs {
        push_limit(&mut script, verb, lease);
    }
    if script.is_empty() {
        return Ok(());
    }
    nft::run(&script, "change a guest's limit of connections")?;
    record(leases).map(drop)
}

/// Removes the table, if it is there.
pub(super) fn clear(leases: &Leases) -> Result<(), HostNetError> {
    let script = clear_script("bridge") + &clear_script("inet");
    nft::run(&script, "remove its table")?;
    leases.remove_ruleset()
}

/// Writes down what the packet filter is like now, and returns what stands in the guests' way;
/// `None` where our table is missing.
fn record(leases: &Leases) -> Result<Option<Vec<String>>, HostNetError> {
    // Asked first: a change that comes after it is seen as one.
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

/// Removes the table by which versions before this one guarded taps.
pub(super) fn remove_older() -> Result<(), HostNetError> {
    nft::run(
        &clear_script("bridge"),
        "remove the table of an older version",
    )
}

fn clear_script(family: &str) -> String {
    // Adding first makes the deletion succeed for a table that is not there.
    format!("add table {family} clone\ndelete table {family} clone\n")
}

fn script(leases: &[Lease], range: &Range) -> String {
    let mut script = clear_script("bridge") + &clear_script("inet");
    push_table(&mut script, range);
    for lease in leases {
        push_limit(&mut script, "add", lease);
    }
    script
}

fn push_table(script: &mut String, range: &Range) {
    // Guests reach the world and the host; the world reaches them only in answer, the host always.
    // What stays on the bridge passes here only where br_netfilter is loaded.
    let unrouted = !ROUTED_MARK;
    let _ = write!(
        script,
        "table inet clone {{
  set exempt {{ type ipv4_addr; }}
  set own_limits {{ type ipv4_addr; ct count over {CONNECTIONS}; }}
  set connections {{ type ipv4_addr; size 65535; flags dynamic; }}
  chain connections {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != {BRIDGE:?} accept
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
