//! Finds other rules of the host that block guests' traffic.
//!
//! A packet that one table accepts may still be dropped by another. Docker and many firewalls drop
//! all forwarded packets that they have no rule for. Those rules belong to their owners, so they
//! are not changed; instead, a notice at the start of a VM says what helps.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::nft;
use super::{BRIDGE, HostNetError};

/// A chain of another table that drops forwarded packets which it has no rule for.
struct Chain {
    family: String,
    table: String,
    name: String,
}

/// One notice for each firewall that drops guests' packets to other networks.
pub(super) fn obstacles() -> Result<Vec<String>, HostNetError> {
    let mut notices = Vec::new();
    let Some(chains) = nft::list_json("list chains")? else {
        return Ok(notices);
    };
    for chain in forwarding(&chains) {
        let Chain {
            family,
            table,
            name,
        } = &chain.0;
        let drops = chain.1 || ends_with_drop(family, table, name)?;
        let rules = nft::list(&format!("list table {family} {table}"))?.unwrap_or_default();
        if drops && !rules.contains(&format!("{BRIDGE:?}")) {
            let place = format!("chain {name} of table {family} {table}");
            notices.push(notice(&place, advice(table, &rules)));
        }
    }
    notices.extend(legacy_obstacle());
    Ok(notices)
}

fn notice(place: &str, advice: String) -> String {
    format!(
        "the host's firewall drops what is forwarded ({place}): the guest reaches this host and \
         nothing beyond it. {advice} Or connect the guest with --net bridge=NAME"
    )
}

fn advice(table: &str, rules: &str) -> String {
    if rules.contains("DOCKER-USER") {
        return docker_advice("iptables");
    }
    if table == "firewalld" {
        return format!(
            "This lets it through: firewall-cmd --permanent --zone=trusted \
             --add-interface={BRIDGE} && firewall-cmd --reload."
        );
    }
    format!("Accept there what comes from the interface {BRIDGE}, and the answers to it.")
}

fn docker_advice(program: &str) -> String {
    format!(
        "This lets it through: {program} -I DOCKER-USER -i {BRIDGE} -j ACCEPT && {program} -I \
         DOCKER-USER -o {BRIDGE} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT."
    )
}

/// The chains that forwarded IPv4 packets pass, and whether their policy is to drop.
fn forwarding(listed: &Value) -> Vec<(Chain, bool)> {
    let chains = listed["nftables"].as_array().into_iter().flatten();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    chains
        .map(|entry| &entry["chain"])
        .filter(|chain| chain["hook"] == "forward" && chain["table"] != "clone")
        .filter(|chain| chain["family"] == "ip" || chain["family"] == "inet")
        .map(|chain| {
            let place = Chain {
                family: word(&chain["family"]),
                table: word(&chain["table"]),
                name: word(&chain["name"]),
            };
            (place, chain["policy"] == "drop")
        })
        .collect()
}

/// Whether a chain's last rule drops all remaining packets.
fn ends_with_drop(family: &str, table: &str, name: &str) -> Result<bool, HostNetError> {
    let listed = nft::list_json(&format!("list chain {family} {table} {name}"))?;
    let last = listed.as_ref().and_then(|listed| {
        let entries = listed["nftables"].as_array()?;
        entries
            .iter()
            .filter_map(|entry| entry["rule"]["expr"].as_array())
            .next_back()
    });
    let is = |statement: &Value, names: &[&str]| {
        let keys = statement.as_object().into_iter().flat_map(|it| it.keys());
        keys.into_iter().all(|key| names.contains(&key.as_str()))
    };
    Ok(last.is_some_and(|statements| {
        statements
            .iter()
            .all(|it| is(it, &["drop", "reject", "counter", "log"]))
            && statements.iter().any(|it| is(it, &["drop", "reject"]))
    }))
}

/// The notice for a dropping table of an older iptables version, which `nft` does not show.
fn legacy_obstacle() -> Option<String> {
    let tables = fs::read_to_string("/proc/net/ip_tables_names").ok()?;
    if !tables.lines().any(|table| table == "filter") {
        return None;
    }
    let output = Command::new("iptables-legacy").arg("-S").output().ok()?;
    let rules = String::from_utf8_lossy(&output.stdout);
    if !rules.contains("-P FORWARD DROP") || rules.contains(BRIDGE) {
        return None;
    }
    let advice = if rules.contains("DOCKER-USER") {
        docker_advice("iptables-legacy")
    } else {
        format!("Accept there what comes from the interface {BRIDGE}, and the answers to it.")
    };
    Some(notice("chain FORWARD of iptables-legacy", advice))
}
