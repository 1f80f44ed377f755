//! The limit of open files of a server, whose connections and sessions take one each.

use rustix::process::{Resource, getrlimit, setrlimit};

/// The files that a server has open besides: its database, its log, connections to nodes.
const OWN: usize = 512;

/// Raises the limit of open files to its maximum. Each VM and each connection takes some, and the
/// usual limit (1,024) is for programs that call select(2).
pub(super) fn raise_limit() -> rustix::io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
}

/// Logs where so many connections of clients, and sessions with guests, do not fit in the limit.
pub(super) fn check_limit(connections: usize, sessions: usize) {
    let limit = getrlimit(Resource::Nofile).current;
    if let Some(shortage) = shortage(limit, connections, sessions) {
        tracing::warn!("{shortage}");
    }
}

fn shortage(limit: Option<u64>, connections: usize, sessions: usize) -> Option<String> {
    let needed = connections.saturating_add(sessions).saturating_add(OWN) as u64;
    let limit = limit.filter(|limit| *limit < needed)?;
    Some(format!(
        "this process may open {limit} files, and up to {needed} are needed for {connections} \
         connections of clients (--max-connections) and {sessions} sessions with guests \
         (--max-sessions): those for which none are left will fail. Lower these limits, or raise the \
         hard limit of open files (LimitNOFILE= of the systemd unit, or `ulimit -Hn`)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_do_not_fit_in_the_open_files_are_named_with_the_way_out() {
        assert_eq!(shortage(None, 30_000, 10_000), None);
        assert_eq!(shortage(Some(40_512), 30_000, 10_000), None);
        let shortage = shortage(Some(20_000), 30_000, 10_000).unwrap();
        for part in [
            "20000",
            "40512",
            "--max-sessions",
            "--max-connections",
            "LimitNOFILE=",
        ] {
            assert!(shortage.contains(part), "{shortage}");
        }
    }

    #[test]
    fn a_server_has_all_the_open_files_that_it_may_have() {
        raise_limit().unwrap();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
