//! What a VM uses, by the host's own count, and what its guest has written to the serial console.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use army_api::figures::{MAX_CONSOLE_BYTES, VmFigures};
use army_api::vms::VmMemory;
use army_node_api::requests::ConsoleOutput;
use army_node_api::{Error, ErrorKind, Result};
use clone_api::Client;
use clone_host::runtime::RunningVm;

use crate::Node;

impl Node {
    /// Measures a VM that runs.
    pub fn measure(&self, id: &str) -> Result<VmFigures> {
        let vm = self.find(id)?;
        let stats = Client::new(vm.dir.control_socket()).stats()?;
        let net = |name: &str| {
            let devices = stats.devices.iter();
            let nets = devices.filter(|(device, _)| device.starts_with("net"));
            nets.filter_map(|(_, counters)| counters.get(name)).sum()
        };
        // A VM that has just ended has no more of them.
        let io = fs::read_to_string(format!("/proc/{}/io", vm.process.pid)).unwrap_or_default();
        let guest = stats.memory.guest.clone().unwrap_or_default();
        Ok(VmFigures {
            addresses: addresses(&vm),
            cpu_user_us: stats.cpu.user_us,
            cpu_system_us: stats.cpu.system_us,
            disk_read_bytes: io_counter(&io, "read_bytes"),
            disk_written_bytes: io_counter(&io, "write_bytes"),
            network_received_bytes: net("rx_bytes"),
            network_sent_bytes: net("tx_bytes"),
            memory: VmMemory {
                guest_bytes: stats.memory.guest_bytes,
                private_bytes: stats.memory.private_bytes,
                shared_bytes: guest.shared_bytes,
                swapped_bytes: stats.memory.swapped_bytes,
            },
        })
    }

    /// The last `bytes` of what a VM's guest has written to its serial console.
    pub fn console(&self, id: &str, bytes: u32) -> Result<ConsoleOutput> {
        let vm = self.find(id)?;
        if vm.dir.config()?.console.log_limit.0 == 0 {
            let message = format!("the VM {id} keeps no log of its console");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let most = u64::from(bytes.min(MAX_CONSOLE_BYTES));
        let tail = tail(&[&vm.dir.console_log(), &vm.dir.old_console_log()], most);
        let tail = tail.map_err(|error| Error::internal("read the log of a console", &error))?;
        Ok(ConsoleOutput {
            text: String::from_utf8_lossy(&tail).into_owned(),
        })
    }
}

/// The last bytes of logs together, the newest log first. A log that does not exist is empty.
fn tail(newest_first: &[&Path], most: u64) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    for path in newest_first {
        let mut file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let room = most - all.len() as u64;
        let start = file.metadata()?.len().saturating_sub(room);
        file.seek(SeekFrom::Start(start))?;
        let mut part = Vec::new();
        // The log may grow meanwhile.
        file.take(room).read_to_end(&mut part)?;
        part.append(&mut all);
        all = part;
    }
    Ok(all)
}

/// The addresses that the host has given a VM's guest on the host's own network.
pub(crate) fn addresses(vm: &RunningVm) -> Vec<String> {
    let interfaces = vm.dir.guest_network().unwrap_or_default().into_iter();
    let addresses = interfaces.filter_map(|it| it.address);
    addresses.map(|it| it.address.to_string()).collect()
}

/// A line of `/proc/PID/io` (proc_pid_io(5)).
fn io_counter(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.split_once(": "));
    let value = lines.find(|(of, _)| *of == name).map(|(_, value)| value);
    value.and_then(|it| it.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_goes_back_into_the_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new"), folder.path().join("old"));
        let read = |most| tail(&[&new, &old], most).unwrap();
        assert_eq!(read(10), b"");
        fs::write(&new, "defg").unwrap();
        assert_eq!((read(2), read(10)), (b"fg".to_vec(), b"defg".to_vec()));
        fs::write(&old, "abc").unwrap();
        assert_eq!(read(5), b"cdefg");
        assert_eq!(read(100), b"abcdefg");
    }

    #[test]
    fn the_counters_of_a_process_are_read() {
        let text = fs::read_to_string("/proc/self/io").unwrap();
        assert!(io_counter(&text, "rchar") > 0);
        assert_eq!(
            io_counter("read_bytes: 7\ncancelled_write_bytes: 3", "write_bytes"),
            0
        );
    }
}
