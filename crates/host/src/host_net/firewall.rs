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

/// If the table is as we made it, the notices about other rules that block guests; otherwise
/// `None`.
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

/// Whether the table is as we made it. Other programs' tables are not examined.
pub(super) fn is_whole(leases: &Leases) -> Result<bool, HostNetError> {
    let known = leases.ruleset()?.map(|known| known.table);
    Ok(known.is_some() && known == nft::list(LIST_TABLE)?)
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

/// Sets the limit of a guest's connections, if its lease does not have the default.
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

/// Removes the limits of guests that have ended.
pub(super) fn dismiss(leases: &Leases, released: &[Lease]) -> Result<(), HostNetError> {
    for lease in released {
        // The element is added first, so that its deletion succeeds even if it did not exist.
        match change_limit(leases, lease, &["add", "delete"]) {
            // A missing table has no limits to remove.
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
    }
    script
}

fn push_table(script: &mut String, range: &Range) {
    // Guests may open connections to other networks and to the host. The host may open connections
    // to guests, other networks may only answer. Frames that stay on the bridge pass these rules
    // only if br_netfilter is loaded.
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
