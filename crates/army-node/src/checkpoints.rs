//! Checkpoints of VMs, and rewinding them. They are in the VM's process, so the journal has none.

use army_api::checkpoints::{Checkpoint, Checkpoints, Rewound};
use army_node_api::{Error, ErrorKind, Result};
use clone_api::checkpoints::{CheckpointInfo, CheckpointList, CheckpointName};
use clone_host::checkpoint;

use crate::Node;

impl Node {
    /// Takes a checkpoint of a VM, which is woken where it is suspended.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the name is taken or the VM has too many.
    pub fn checkpoint(&self, id: &str, name: &str) -> Result<Checkpoint> {
        let name = parse(name)?;
        let vm = self.find_awake(id)?;
        self.turns.take(id, || {
            self.journal.get(id)?.check_changeable()?;
            self.mark_used(id);
            let taken = checkpoint::take(&self.runtime, &vm, &name)?;
            Ok(described(taken.checkpoint))
        })
    }

    /// The checkpoints of a VM. A suspended one has none.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the VM does not run.
    pub fn checkpoints(&self, id: &str) -> Result<Checkpoints> {
        if self.journal.get(id)?.suspended {
            return Ok(Checkpoints::default());
        }
        Ok(listed(checkpoint::list(&self.find(id)?)?))
    }

    /// Removes a checkpoint of a VM, and returns the others.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such checkpoint.
    pub fn remove_checkpoint(&self, id: &str, name: &str) -> Result<Checkpoints> {
        let name = parse(name)?;
        Ok(listed(checkpoint::remove(&self.find(id)?, &name)?))
    }

    /// Sets a VM back to a checkpoint.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such checkpoint. A VM that was set back only in part
    /// stays paused, which the error says.
    pub fn rewind(&self, id: &str, name: &str) -> Result<Rewound> {
        let name = parse(name)?;
        self.turns.take(id, || {
            self.journal.get(id)?.check_changeable()?;
            self.mark_used(id);
            let back = checkpoint::rewind(&self.find(id)?, &name);
            self.reports.invalidate(id);
            let back = back?;
            let rewound = back.rewound;
            Ok(Rewound {
                checkpoint: rewound.checkpoint.to_string(),
                running: rewound.running,
                pause_us: rewound.times.pause_us,
                clock_us: back.clock_us,
                memory_bytes: rewound.dropped_bytes + rewound.read_bytes,
                notices: back.notices,
            })
        })
    }
}

fn parse(name: &str) -> Result<CheckpointName> {
    name.parse()
        .map_err(|error: clone_api::ApiError| Error::new(ErrorKind::InvalidRequest, error.message))
}

fn described(info: CheckpointInfo) -> Checkpoint {
    Checkpoint {
        name: info.name.to_string(),
        parent: info.parent.map(|parent| parent.to_string()),
        created_ms: info.created_unix_ms,
        memory_bytes: info.memory_bytes,
        disk_bytes: info.disk_bytes,
    }
}

fn listed(list: CheckpointList) -> Checkpoints {
    Checkpoints {
        checkpoints: list.checkpoints.into_iter().map(described).collect(),
        present: list.present.map(|name| name.to_string()),
        used_bytes: list.used_bytes,
    }
}
