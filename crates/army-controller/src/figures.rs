//! What VMs use, and what their guests have written to their consoles: questions to their hosts.

use army_api::figures::VmFigures;
use army_api::vms::Vm;
use army_node_api::requests::{MeasureVmRequest, ReadConsoleRequest};

use crate::{Controller, Result, deadlines};

impl Controller {
    /// What a VM uses.
    pub async fn measure_vm(&self, vm: &Vm) -> Result<VmFigures> {
        let node = self.present_node_of(vm)?;
        let request = MeasureVmRequest { vm: vm.id.clone() };
        Ok(node.measure_vm(request, deadlines::agent().into()).await?)
    }

    /// The last bytes of what a VM's guest has written to its serial console.
    pub async fn console(&self, vm: &Vm, bytes: u32) -> Result<String> {
        let node = self.present_node_of(vm)?;
        let vm = vm.id.clone();
        let request = ReadConsoleRequest { vm, bytes };
        let output = node
            .read_console(request, deadlines::agent().into())
            .await?;
        Ok(output.text)
    }
}
