//! What a fork makes the host's kernel do from the start of its process to the first reply: page
//! faults, and exits from the guest. Unlike times, these are nearly the same on any machine.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::record::{Figure, Record};

/// A folder for each VM, named after its process and a descriptor of it; root alone sees it, and only
/// where debugfs is mounted.
const VMS: &str = "/sys/kernel/debug/kvm";

/// Of several forks.
#[derive(Default)]
pub(super) struct Counts {
    faults: Vec<f64>,
    exits: Vec<f64>,
}

impl Counts {
    /// Counts what the process of a VM has caused up to now.
    pub(super) fn add(&mut self, pid: u32) -> Result<()> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let faults = faults(&stat).with_context(|| format!("{path} has no faults: {stat}"))?;
        self.faults.push(faults);
        self.exits.extend(exits(Path::new(VMS), pid)?);
        Ok(())
    }

    /// Adds what there is to the record.
    pub(super) fn record(self, record: &mut Record, what: &str) {
        let kinds = [("page faults", self.faults), ("exits", self.exits)];
        for (kind, counted) in kinds.into_iter().filter(|(_, counted)| !counted.is_empty()) {
            let name = format!("{what}: {kind} until the reply");
            record.add(Figure::new(&name, "times", counted));
        }
    }
}

/// Those that waited for no disk and those that did (proc_pid_stat(5), fields 10 and 12).
fn faults(stat: &str) -> Option<f64> {
    let after_name = stat.rsplit_once(") ")?.1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    // The first one after the name is field 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some(field(10)? + field(12)?)
}

/// Of all CPUs of the process's VM; none where the kernel does not tell.
fn exits(vms: &Path, pid: u32) -> Result<Option<f64>> {
    let Ok(folders) = fs::read_dir(vms) else {
        return Ok(None);
    };
    for folder in folders {
        let folder = folder?;
        let name = folder.file_name();
        let owner = name.to_str().and_then(|name| name.split_once('-'));
        if owner.is_some_and(|(owner, _)| owner == pid.to_string()) {
            let count = fs::read_to_string(folder.path().join("exits"))?;
            return Ok(Some(count.trim().parse()?));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 120 9 3 0 0 0 0 0 20 0 1 0 4711 0 0\n";
        assert_eq!(faults(stat), Some(123.0));
        assert_eq!(faults("7 (a) S 1"), None);
    }

    #[test]
    fn exits_are_those_of_the_process_that_was_named() {
        let root = tempfile::tempdir().unwrap();
        for (vm, count) in [("12-9", "5\n"), ("1-9", "6\n")] {
            fs::create_dir(root.path().join(vm)).unwrap();
            fs::write(root.path().join(vm).join("exits"), count).unwrap();
        }
        assert_eq!(exits(root.path(), 1).unwrap(), Some(6.0));
        assert_eq!(exits(root.path(), 12).unwrap(), Some(5.0));
        assert_eq!(exits(root.path(), 2).unwrap(), None);
        assert_eq!(exits(&root.path().join("none"), 1).unwrap(), None);
    }
}
