//! Programs at an interface's traffic control hooks, by netlink.
//!
//! Each direction has two filters: the program, which answers whether a frame passes, and after it
//! one that drops every frame. So what a program does not accept is dropped, whatever the reason.
//! Source: the Linux kernel's `cls_bpf`.

use std::io;

use rtnetlink::packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::HostNetError;
use super::guard::{self, Encoded};
use super::link::{Links, failed};

/// Attributes of a filter of classic BPF (`TCA_BPF_OPS_LEN`, `TCA_BPF_OPS`), and the flag that a
/// program's answer is an action (`TCA_BPF_FLAG_ACT_DIRECT` of `TCA_BPF_FLAGS`).
const OPS_LEN: u16 = 4;
const OPS: u16 = 5;
const FLAGS: u16 = 8;
const ACT_DIRECT: u32 = 1;

const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };

/// A direction, as seen by the host.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    /// What the host receives from the interface.
    Ingress,
    /// What the host sends to the interface.
    Egress,
}

impl Hook {
    fn parent(self) -> TcHandle {
        TcHandle {
            major: 0xffff,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

impl Links {
    /// Judges the frames of an interface by `program` from now on, in place of the one before. The
    /// change is one step: no frame passes in between.
    pub(super) fn judge(
        &self,
        interface: &str,
        index: u32,
        hook: Hook,
        program: &Encoded,
    ) -> Result<(), HostNetError> {
        let index = index as i32;
        self.add_hooks(index)
            .and_then(|()| self.set_filter(index, hook, 2, &guard::drop_all(), ACT_DIRECT))
            .and_then(|()| self.set_filter(index, hook, 1, program, 0))
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::EOPNOTSUPP) => HostNetError::NoTrafficControl(source),
                _ => failed("guard the interface", interface)(source),
            })
    }

    fn add_hooks(&self, index: i32) -> io::Result<()> {
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle {
            major: 0xffff,
            minor: 0,
        };
        message
            .attributes
            .push(TcAttribute::Kind("clsact".to_owned()));
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        match self.send(message, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    fn set_filter(
        &self,
        index: i32,
        hook: Hook,
        priority: u16,
        program: &Encoded,
        flags: u32,
    ) -> io::Result<()> {
        let mut message = TcMessage::with_index(index);
        message.header.parent = hook.parent();
        message.header.handle = HANDLE;
        message.header.info = TcHandle {
            major: priority,
            minor: ALL_PROTOCOLS,
        }
        .into();
        let option = |kind, value: Vec<u8>| {
            TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)))
        };
        message.attributes = vec![
            TcAttribute::Kind("bpf".to_owned()),
            TcAttribute::Options(vec![
                option(OPS_LEN, (program.count as u16).to_ne_bytes().to_vec()),
                option(OPS, program.bytes.clone()),
                option(FLAGS, flags.to_ne_bytes().to_vec()),
            ]),
        ];
        self.send(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE)
    }

    fn send(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(|_| ())
    }
}
