//! The operations of a node that take a request and nothing else, for what wraps nodes.

/// Gives the method, the request and the answer of each operation to a macro. `import_template`, whose
/// content can be sent once only, is left to each wrapper.
macro_rules! for_each_operation {
    ($pass_on:ident) => {
        $pass_on! {
            create_vms: army_node_api::requests::CreateVmsRequest => army_node_api::requests::CreateVmsResponse;
            fork_vm: army_node_api::requests::ForkVmRequest => army_node_api::requests::CreateVmsResponse;
            destroy_vm: army_node_api::requests::DestroyVmRequest => ();
            pause_vm: army_node_api::requests::PauseVmRequest => ();
            suspend_vm: army_node_api::requests::SuspendVmRequest => ();
            checkpoint_vm: army_node_api::requests::CheckpointVmRequest => army_api::checkpoints::Checkpoint;
            list_checkpoints: army_node_api::requests::ListCheckpointsRequest => army_api::checkpoints::Checkpoints;
            remove_checkpoint: army_node_api::requests::RemoveCheckpointRequest => army_api::checkpoints::Checkpoints;
            rewind_vm: army_node_api::requests::RewindVmRequest => army_api::checkpoints::Rewound;
            resume_vm: army_node_api::requests::ResumeVmRequest => ();
            update_vm: army_node_api::requests::UpdateVmRequest => ();
            balloon: army_node_api::requests::BalloonRequest => army_api::vms::Balloon;
            measure_vm: army_node_api::requests::MeasureVmRequest => army_api::figures::VmFigures;
            read_console: army_node_api::requests::ReadConsoleRequest => army_node_api::requests::ConsoleOutput;
            snapshot_vm: army_node_api::requests::SnapshotVmRequest => army_node_api::requests::TemplateFacts;
            connect_agent: army_node_api::requests::ConnectAgentRequest => army_node_api::AgentStream;
            offer_vm: army_node_api::requests::OfferVmRequest => army_node_api::requests::VmOffer;
            expect_vm: army_node_api::requests::ExpectVmRequest => ();
            send_vm: army_node_api::requests::SendVmRequest => army_node_api::requests::SentVm;
            inspect_move: army_node_api::requests::InspectMoveRequest => army_node_api::requests::MoveStatus;
            decide_move: army_node_api::requests::DecideMoveRequest => ();
            inspect_template: army_node_api::requests::InspectTemplateRequest => army_node_api::requests::TemplateFacts;
            set_standbys: army_node_api::requests::SetStandbysRequest => ();
            remove_template: army_node_api::requests::RemoveTemplateRequest => ();
            fetch_template: army_node_api::requests::FetchTemplateRequest => ();
            admit_fetch: army_node_api::requests::AdmitFetchRequest => ();
            export_template: army_node_api::requests::ExportTemplateRequest => army_node_api::chunks::ChunkReceiver;
            report: army_node_api::requests::ReportRequest => army_node_api::requests::HostReport;
            forget_vms: army_node_api::requests::ForgetVmsRequest => ();
            request_renewal: army_node_api::requests::RenewalRequest => army_node_api::requests::RenewalResponse;
            install_certificate: army_node_api::requests::InstallCertificateRequest => ();
        }
    };
}
pub(crate) use for_each_operation;
