//! The border between the controller and its nodes.
//!
//! A node, and the guests that it speaks for, may be hostile or broken. Everything that a node
//! answers passes [`Checked`], which every node of the controller is wrapped in: texts become
//! printable and short (a NUL would stop PostgreSQL), and sizes stay in the range of the database.
//! A certificate signing request is the one text that is left as it is; the authority parses it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use agent_proto::text::{MAX_TEXT, printable};
use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_api::figures::{MAX_CONSOLE_BYTES, VmFigures};
use army_api::hosts::Capacity;
use army_api::templates::CpuFeatures;
use army_api::vms::{Balloon, VmMemory};
use army_node_api::chunks::ChunkReceiver;
use army_node_api::requests::{
    ConsoleOutput, CreateVmsResponse, CreatedVm, HostReport, ImportTemplateRequest, MoveStatus,
    RenewalResponse, SentVm, TemplateFacts, VmOffer,
};
use army_node_api::{AgentStream, Call, Error, NodeApi, Reply, Result};

use crate::operation_list::for_each_operation;

/// The largest size that a node can report, in bytes. Sums of such sizes do not overflow.
const MAX_BYTES: u64 = 1 << 52;
/// The most elements of a list of texts that a node reports of one object.
const MAX_TEXTS: usize = 100;

/// A node whose answers are checked.
pub(crate) struct Checked(pub(crate) Arc<dyn NodeApi>);

/// A value of a node that can be made fit for the database and for people.
trait Check {
    /// The value with its texts printable and its sizes within range.
    fn check(self) -> Self;
}

/// Values that have nothing to check.
macro_rules! unchecked {
    ($($type:ty),*) => {
        $(impl Check for $type {
            fn check(self) -> Self {
                self
            }
        })*
    };
}
unchecked!((), AgentStream, ChunkReceiver, RenewalResponse);

impl Check for String {
    fn check(self) -> Self {
        // Nearly all texts are ids of VMs, of which each report has many.
        let is_plain = self.bytes().all(|it| it == b' ' || it.is_ascii_graphic());
        match is_plain && self.len() <= MAX_TEXT {
            true => self,
            false => printable(&self),
        }
    }
}

impl Check for u64 {
    fn check(self) -> Self {
        self.min(MAX_BYTES)
    }
}

impl<T: Check> Check for Option<T> {
    fn check(self) -> Self {
        self.map(T::check)
    }
}

impl<T: Check> Check for Vec<T> {
    fn check(self) -> Self {
        self.into_iter().map(T::check).collect()
    }
}

impl<T: Check> Check for Result<T> {
    fn check(self) -> Self {
        self.map(T::check).map_err(Error::check)
    }
}

impl Check for Error {
    fn check(self) -> Self {
        let message = printable(&self.message);
        let public = without_paths(&message);
        if public != message {
            tracing::warn!(
                message,
                "the answer to this failure leaves out the host's paths"
            );
        }
        Self {
            kind: self.kind,
            message: public,
            advice: self.advice.check().as_deref().map(without_paths),
        }
    }
}

/// A text of a host for users, who may not see the host's paths: of each absolute path in it, only the
/// last name is kept, as in `…/t`. What a guest says of its own files does not pass here.
fn without_paths(text: &str) -> String {
    let mut public = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    let mut previous = ' ';
    while let Some(character) = characters.next() {
        let begins = previous.is_whitespace() || "`'\"(=[".contains(previous);
        let goes_on = characters.peek().is_some_and(|next| next.is_alphanumeric());
        previous = character;
        if character != '/' || !begins || !goes_on {
            public.push(character);
            continue;
        }
        let is_path = |it: &char| !it.is_whitespace() && !"`'\")],;:".contains(*it);
        let path: String = std::iter::from_fn(|| characters.next_if(is_path)).collect();
        let name = path.trim_end_matches('/').rsplit('/').next();
        public.push_str("…/");
        public.push_str(name.unwrap_or_default());
        previous = path.chars().next_back().unwrap_or('/');
    }
    public
}

impl Check for VmFigures {
    fn check(mut self) -> Self {
        self.addresses.truncate(MAX_TEXTS);
        Self {
            addresses: self.addresses.check(),
            cpu_user_us: self.cpu_user_us.check(),
            cpu_system_us: self.cpu_system_us.check(),
            disk_read_bytes: self.disk_read_bytes.check(),
            disk_written_bytes: self.disk_written_bytes.check(),
            network_received_bytes: self.network_received_bytes.check(),
            network_sent_bytes: self.network_sent_bytes.check(),
            memory: self.memory.check(),
        }
    }
}

impl Check for ConsoleOutput {
    /// The text stays as it is, because it is requested as the guest's own; only its size is
    /// limited. A byte that was replaced takes three.
    fn check(mut self) -> Self {
        let most = MAX_CONSOLE_BYTES as usize * 3;
        if self.text.len() > most {
            self.text.truncate(self.text.floor_char_boundary(most));
        }
        self
    }
}

impl Check for Balloon {
    fn check(self) -> Self {
        Self {
            target_bytes: self.target_bytes.check(),
            actual_bytes: self.actual_bytes.check(),
            available_bytes: self.available_bytes.check(),
        }
    }
}

impl Check for Checkpoint {
    fn check(self) -> Self {
        Self {
            name: self.name.check(),
            parent: self.parent.check(),
            created_ms: self.created_ms.check(),
            memory_bytes: self.memory_bytes.check(),
            disk_bytes: self.disk_bytes.check(),
        }
    }
}

impl Check for Checkpoints {
    fn check(mut self) -> Self {
        self.checkpoints.truncate(MAX_TEXTS);
        Self {
            checkpoints: self.checkpoints.check(),
            present: self.present.check(),
            used_bytes: self.used_bytes.check(),
        }
    }
}

impl Check for Rewound {
    fn check(mut self) -> Self {
        self.notices.truncate(MAX_TEXTS);
        Self {
            checkpoint: self.checkpoint.check(),
            running: self.running,
            pause_us: self.pause_us.check(),
            clock_us: self.clock_us.check(),
            memory_bytes: self.memory_bytes.check(),
            notices: self.notices.check(),
        }
    }
}

impl Check for VmMemory {
    fn check(self) -> Self {
        Self {
            guest_bytes: self.guest_bytes.check(),
            private_bytes: self.private_bytes.check(),
            shared_bytes: self.shared_bytes.check(),
            swapped_bytes: self.swapped_bytes.check(),
        }
    }
}

impl Check for Capacity {
    fn check(self) -> Self {
        Self {
            cpus: self.cpus,
            load_milli: self.load_milli,
            memory_bytes: self.memory_bytes.check(),
            available_bytes: self.available_bytes.check(),
            promised_bytes: self.promised_bytes.check(),
            private_bytes: self.private_bytes.check(),
            disk_free_bytes: self.disk_free_bytes.check(),
            run_free_bytes: self.run_free_bytes.check(),
        }
    }
}

impl Check for CpuFeatures {
    fn check(self) -> Self {
        let features = self.features.into_iter().take(MAX_TEXTS);
        let features: BTreeMap<_, _> = features.map(|(leaf, it)| (leaf.check(), it)).collect();
        Self {
            vendor: self.vendor.check(),
            features,
        }
    }
}

impl Check for CreatedVm {
    fn check(mut self) -> Self {
        self.notices.truncate(MAX_TEXTS);
        self.addresses.truncate(MAX_TEXTS);
        self.addresses = self.addresses.check();
        let notices = self.notices.check();
        self.notices = notices.iter().map(|it| without_paths(it)).collect();
        self
    }
}

impl Check for CreateVmsResponse {
    fn check(self) -> Self {
        Self {
            results: self.results.check(),
        }
    }
}

impl Check for TemplateFacts {
    fn check(self) -> Self {
        Self {
            id: self.id.check(),
            parent: self.parent.check(),
            memory_bytes: self.memory_bytes.check(),
            data_bytes: self.data_bytes.check(),
            vcpus: self.vcpus,
            disk_bytes: self.disk_bytes.check(),
            taken_ms: self.taken_ms.check(),
            cpu: self.cpu.check(),
        }
    }
}

impl Check for VmOffer {
    fn check(self) -> Self {
        Self {
            template: self.template.check(),
            template_id: self.template_id.check(),
            private_bytes: self.private_bytes.check(),
            cpu: self.cpu.check(),
            // Only nodes read it.
            ceiling: self.ceiling,
        }
    }
}

impl Check for SentVm {
    fn check(self) -> Self {
        Self {
            bytes: self.bytes.check(),
            pause_us: self.pause_us.check(),
            total_us: self.total_us.check(),
            rounds: self.rounds,
        }
    }
}

impl Check for MoveStatus {
    fn check(self) -> Self {
        Self {
            presence: self.presence,
            epoch: self.epoch.check(),
            departure: self.departure.check(),
            reason: self.reason.check().as_deref().map(without_paths),
            sent_bytes: self.sent_bytes.check(),
        }
    }
}

impl Check for HostReport {
    fn check(mut self) -> Self {
        for missing in &mut self.missing_jail_layers {
            missing.layer = printable(&missing.layer);
            missing.reason = printable(&missing.reason);
        }
        for vm in &mut self.vms {
            vm.id = std::mem::take(&mut vm.id).check();
            vm.reason = vm.reason.take().check().as_deref().map(without_paths);
            vm.memory = vm.memory.check();
            vm.epoch = vm.epoch.check();
            vm.addresses.truncate(MAX_TEXTS);
            vm.addresses = std::mem::take(&mut vm.addresses).check();
        }
        self.missing_jail_layers.truncate(MAX_TEXTS);
        self.notices.truncate(MAX_TEXTS);
        let ready = self.ready.into_iter();
        Self {
            capacity: self.capacity.check(),
            ready: ready.map(|(name, count)| (name.check(), count)).collect(),
            standbys: self.standbys.map(|standbys| {
                let standbys = standbys.into_iter();
                standbys
                    .map(|(name, count)| (name.check(), count))
                    .collect()
            }),
            cpu: self.cpu.check(),
            notices: self.notices.check(),
            ..self
        }
    }
}

/// The checked answer of a call.
fn checked<'a, T: Check + Send + 'a>(reply: Reply<'a, T>) -> Reply<'a, T> {
    Box::pin(async move { reply.await.check() })
}

/// Passes calls on, and checks their answers.
macro_rules! pass_on {
    ($($name:ident: $request:ty => $response:ty;)*) => {
        $(fn $name(&self, request: $request, call: Call) -> Reply<'_, $response> {
            checked(self.0.$name(request, call))
        })*
    };
}

impl NodeApi for Checked {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn address(&self) -> Option<SocketAddr> {
        self.0.address()
    }

    for_each_operation!(pass_on);

    fn import_template(
        &self,
        request: ImportTemplateRequest,
        content: ChunkReceiver,
        call: Call,
    ) -> Reply<'_, TemplateFacts> {
        checked(self.0.import_template(request, content, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use army_api::vms::VmState;
    use army_node_api::ErrorKind;
    use army_node_api::requests::{CreateVmsRequest, VmReport};
    use army_node_api::simulated::SimulatedNode;

    #[test]
    fn what_a_node_reports_is_printable_and_within_range() {
        let report = HostReport {
            capacity: Capacity {
                available_bytes: u64::MAX,
                ..Capacity::default()
            },
            vms: vec![VmReport {
                epoch: 1,
                id: "x\0".into(),
                state: VmState::Failed,
                reason: Some("\u{1b}[2J".repeat(1000)),
                memory: None,
                addresses: vec!["\n".into(); 1000],
            }],
            ready: [("t\n".to_owned(), 1)].into(),
            notices: vec!["a\0".into(); 1000],
            ..HostReport::default()
        };
        let report = report.check();
        assert_eq!(report.capacity.available_bytes, MAX_BYTES);
        assert_eq!(report.vms[0].id, "x\\0");
        assert_eq!(report.vms[0].addresses, vec!["\\n".to_owned(); MAX_TEXTS]);
        let reason = report.vms[0].reason.as_deref().unwrap();
        assert!(reason.chars().count() <= 500 && !reason.contains('\u{1b}'));
        assert!(report.ready.contains_key("t\\n"));
        assert_eq!(report.notices, vec!["a\\0".to_owned(); MAX_TEXTS]);
    }

    #[test]
    fn a_plain_text_stays_as_it_is_and_any_other_becomes_printable() {
        let long = "x".repeat(MAX_TEXT + 1);
        for text in ["fleet-1", "a \"b\" 'c' \\ d", "", "é\u{7f}", "a\tb", &long] {
            assert_eq!(text.to_owned().check(), printable(text));
        }
    }

    #[test]
    fn users_do_not_see_paths_of_hosts() {
        for (text, public) in [
            (
                "cannot open /var/lib/clone/t/state: denied",
                "cannot open …/state: denied",
            ),
            ("`/dev/kvm` (/run/x), and/or", "`…/kvm` (…/x), and/or"),
            (
                "10.0.0.0/8 by https://a/b / c",
                "10.0.0.0/8 by https://a/b / c",
            ),
        ] {
            assert_eq!(without_paths(text), public);
        }
    }

    #[tokio::test]
    async fn the_error_of_a_node_is_printable() {
        let error = Error::new(ErrorKind::Conflict, "the guest said \0 and \u{1b}[2J");
        let node = SimulatedNode::new("a").with_creation(Err(error));
        let vm = army_node_api::requests::VmSpec::new("1".into(), 1, "a".into());
        let request = CreateVmsRequest {
            template: "t".into(),
            vms: vec![vm],
        };
        let call = crate::deadlines::operation();
        let response = Checked(Arc::new(node)).create_vms(request, call).await;
        let error = match response {
            Ok(response) => response.results.into_iter().next().unwrap().unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.message, "the guest said \\0 and \\u{1b}[2J");
    }
}
