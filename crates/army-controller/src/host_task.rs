//! The task of one host: it asks the host for reports, at a rhythm of its own, and has done on the
//! host what the reports show to be missing.
//!
//! Whatever a host is asked for has a deadline of seconds and is asked beside everything else. A VM
//! whose end hangs or fails delays neither other VMs nor the reports, and is tried again, less and
//! less often. What a report says is compared and recorded by [`reconcile`](crate::reconcile).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use army_api::vms::VmState;
use army_node_api::requests::{
    DestroyVmRequest, ForgetVmsRequest, HostReport, MoveDecision, ReportRequest, SetStandbysRequest,
};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::reconcile::{Asked, Findings};
use crate::vms::DESTROYED;
use crate::{Controller, Node, Result, deadlines, random};

/// The time between two reports of a host, or between a failure and the next attempt.
const ROUND: Duration = Duration::from_secs(1);
/// The longest time between two attempts to reach a host that does not answer.
const UNREACHABLE_ROUND: Duration = Duration::from_secs(8);
/// The number of VMs of a host that are ended at the same time.
const DESTROYS: usize = 16;
/// The most VMs that a node is asked to forget at once.
const FORGOTTEN: usize = 1000;
/// The pause before what has failed is tried again; it doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The task of one host. All of its work ends when this is dropped.
pub(crate) struct HostTask<'a> {
    controller: &'a Controller,
    node: Node,
    work: FuturesUnordered<BoxFuture<'a, Done>>,
    /// VMs that wait for their turn to be ended.
    queue: VecDeque<String>,
    /// The number of VMs that the host is being asked to end.
    ending: usize,
    /// What is being done, or is to be tried again later.
    attempts: HashMap<Job, Attempt>,
    /// The number of failures to get a report since the last one.
    failures: u32,
}

/// Something that a host is to do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Job {
    /// End this VM.
    End(String),
    /// Forget VMs that have ended.
    Forget,
    /// Keep standbys of this template.
    Standbys(String),
    /// Apply the changes of VMs that it has not applied.
    Changes,
    /// Know that this VM is its own, after a move that has failed.
    Keep(String),
}

struct Attempt {
    failures: u32,
    /// When it may be tried again; `None` while it is being done.
    again: Option<Instant>,
    /// Whether a VM that is to be ended has not ended by the database.
    is_recorded: bool,
}

/// Work that is done.
enum Done {
    Report(Box<(Result<HostReport>, Asked)>),
    Job(Job, Result<()>),
}

impl<'a> HostTask<'a> {
    pub(crate) fn new(controller: &'a Controller, node: Node) -> Self {
        Self {
            controller,
            node,
            work: FuturesUnordered::new(),
            queue: VecDeque::new(),
            ending: 0,
            attempts: HashMap::new(),
            failures: 0,
        }
    }

    fn host(&self) -> String {
        self.node.name().to_owned()
    }

    /// Asks for reports, without an end.
    pub(crate) async fn run(mut self) {
        loop {
            self.controller.loops.begin_host_round(self.node.name());
            self.ask();
            let mut pause = None;
            loop {
                let due = async {
                    match pause {
                        Some(pause) => tokio::time::sleep_until(pause).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    done = self.work.next(), if !self.work.is_empty() => {
                        if let Some(done) = done && self.finish(done).await {
                            pause = Some(tokio::time::Instant::now() + self.pause());
                        }
                    }
                    () = due => break,
                }
            }
        }
    }

    /// Asks for one report, and returns when all that follows from it is done.
    pub(crate) async fn run_once(mut self) {
        self.ask();
        while let Some(done) = self.work.next().await {
            self.finish(done).await;
        }
    }

    /// The time until the next report: with some jitter, so that hosts do not report in step.
    fn pause(&self) -> Duration {
        let round = match self.failures {
            0 => ROUND,
            failures => ROUND
                .saturating_mul(1 << failures.min(8))
                .min(UNREACHABLE_ROUND),
        };
        round.mul_f64(0.9 + 0.2 * random::fraction())
    }

    /// Asks for a report.
    fn ask(&mut self) {
        let (controller, node) = (self.controller, Node::clone(&self.node));
        self.work.push(Box::pin(async move {
            let asked = match controller.prepare_report(node.name()).await {
                Ok(asked) => asked,
                Err(error) => return Done::Report(Box::new((Err(error), Asked::default()))),
            };
            let deadline = deadlines::question(node.as_ref());
            let report = node.report(ReportRequest::default(), deadline).await;
            Done::Report(Box::new((report.map_err(Into::into), asked)))
        }));
    }

    /// Acts on what is done. Returns whether it was a report, or a failure to get one.
    async fn finish(&mut self, done: Done) -> bool {
        match done {
            Done::Report(reported) => {
                let (report, asked) = *reported;
                let handled = match report {
                    Ok(report) => self.finish_report(report, asked).await,
                    Err(error) => {
                        tracing::debug!(host = self.node.name(), %error, "a host does not report");
                        self.failures += 1;
                        self.controller.mark_unreachable(self.node.name()).await
                    }
                };
                if let Err(error) = handled {
                    let host = self.node.name();
                    tracing::error!(host, %error, "cannot record the state of a host");
                }
                true
            }
            Done::Job(job, result) => {
                self.finish_job(job, result).await;
                false
            }
        }
    }

    async fn finish_report(&mut self, report: HostReport, asked: Asked) -> Result<()> {
        self.failures = 0;
        let standbys = report.standbys.clone();
        let host = self.host();
        let findings = self.controller.apply_report(&host, report, asked).await?;
        self.drop_old_attempts(&findings);
        for id in findings.unwanted {
            self.end(id, true);
        }
        for id in findings.ended_but_running {
            self.end(id, false);
        }
        self.forget(findings.ended);
        for (id, epoch) in findings.undecided {
            self.keep(id, epoch);
        }
        if findings.has_unapplied {
            self.resend_changes();
        }
        match standbys {
            Some(standbys) => self.compare_standbys(standbys).await,
            None => Ok(()),
        }
    }

    /// Forgets failures that are about nothing any more.
    fn drop_old_attempts(&mut self, findings: &Findings) {
        let is_due =
            |id: &String| findings.unwanted.contains(id) || findings.ended_but_running.contains(id);
        self.attempts.retain(|job, attempt| match job {
            Job::End(id) => attempt.again.is_none() || is_due(id),
            Job::Changes => attempt.again.is_none() || findings.has_unapplied,
            Job::Keep(id) => {
                attempt.again.is_none() || findings.undecided.iter().any(|it| it.0 == *id)
            }
            Job::Forget | Job::Standbys(_) => true,
        });
    }

    /// Whether a job may be begun now; then it counts as begun.
    fn begin(&mut self, job: &Job, is_recorded: bool) -> bool {
        match self.attempts.get_mut(job) {
            None => {
                let attempt = Attempt {
                    failures: 0,
                    again: None,
                    is_recorded,
                };
                self.attempts.insert(job.clone(), attempt);
                true
            }
            Some(attempt) => {
                let may = attempt.again.is_some_and(|again| again <= Instant::now());
                if may {
                    attempt.again = None;
                }
                may
            }
        }
    }

    /// Has the host end a VM when it is its turn. Where `is_recorded`, the VM's end is to be recorded
    /// then.
    fn end(&mut self, id: String, is_recorded: bool) {
        if self.begin(&Job::End(id.clone()), is_recorded) {
            self.queue.push_back(id);
            self.end_next();
        }
    }

    fn end_next(&mut self) {
        while self.ending < DESTROYS
            && let Some(id) = self.queue.pop_front()
        {
            self.ending += 1;
            let request = DestroyVmRequest {
                vm: id.clone(),
                reason: DESTROYED.to_owned(),
            };
            let node = Node::clone(&self.node);
            self.work.push(Box::pin(async move {
                let ended = node.destroy_vm(request, deadlines::destruction()).await;
                Done::Job(Job::End(id), ended.map_err(Into::into))
            }));
        }
    }

    /// Has the node forget VMs that have ended.
    fn forget(&mut self, mut vms: Vec<String>) {
        vms.truncate(FORGOTTEN);
        if vms.is_empty() || !self.begin(&Job::Forget, false) {
            return;
        }
        let node = Node::clone(&self.node);
        self.work.push(Box::pin(async move {
            let deadline = deadlines::question(node.as_ref());
            let forgot = node.forget_vms(ForgetVmsRequest { vms }, deadline).await;
            Done::Job(Job::Forget, forgot.map_err(Into::into))
        }));
    }

    /// Tells the node that a VM is its own, which did not leave it.
    fn keep(&mut self, id: String, epoch: u64) {
        if !self.begin(&Job::Keep(id.clone()), false) {
            return;
        }
        let (controller, host) = (self.controller, self.host());
        self.work.push(Box::pin(async move {
            let told = controller.tell(&host, &id, epoch, MoveDecision::Here).await;
            Done::Job(Job::Keep(id), told)
        }));
    }

    /// Has the node apply changes of VMs that it has not applied, because it did not answer.
    fn resend_changes(&mut self) {
        if !self.begin(&Job::Changes, false) {
            return;
        }
        let (controller, node) = (self.controller, Node::clone(&self.node));
        self.work.push(Box::pin(async move {
            Done::Job(Job::Changes, controller.resend_changes(&node).await)
        }));
    }

    /// Has the node keep the standbys that it should keep. It forgets them when it is restarted.
    async fn compare_standbys(&mut self, kept: HashMap<String, u32>) -> Result<()> {
        let host = self.host();
        let differs = |wanted: &BTreeMap<String, u32>| {
            let of = |template: &String| kept.get(template).copied().unwrap_or(0);
            let wanted = wanted.iter();
            let differing = wanted.filter(|(template, count)| of(template) != **count);
            differing
                .map(|(template, count)| (template.clone(), *count))
                .collect::<Vec<_>>()
        };
        if differs(&self.controller.wanted_standbys(&host)).is_empty() {
            return Ok(());
        }
        // They may have been changed since they were read.
        let wanted = self.controller.store.standbys_of_host(&host).await?;
        for (template, standbys) in differs(&wanted) {
            if !self.begin(&Job::Standbys(template.clone()), false) {
                continue;
            }
            let request = SetStandbysRequest {
                template: template.clone(),
                standbys,
            };
            let node = Node::clone(&self.node);
            self.work.push(Box::pin(async move {
                let set = node.set_standbys(request, deadlines::operation()).await;
                Done::Job(Job::Standbys(template), set.map_err(Into::into))
            }));
        }
        Ok(())
    }

    async fn finish_job(&mut self, job: Job, result: Result<()>) {
        let result = match (&job, result) {
            (Job::End(id), Ok(())) if self.attempts.get(&job).is_some_and(|it| it.is_recorded) => {
                let ended = self.controller.store.set_vm_states(
                    std::slice::from_ref(id),
                    VmState::Ended,
                    DESTROYED,
                );
                ended.await
            }
            (_, result) => result,
        };
        if let Job::End(_) = job {
            self.ending -= 1;
            self.end_next();
        }
        match result {
            Ok(()) => {
                self.attempts.remove(&job);
            }
            Err(error) => {
                let host = self.node.name();
                tracing::warn!(host, ?job, %error, "a host did not do what it was asked for");
                if let Some(attempt) = self.attempts.get_mut(&job) {
                    let doubled = FIRST_PAUSE.saturating_mul(1 << attempt.failures.min(8));
                    attempt.failures += 1;
                    attempt.again = Some(Instant::now() + doubled.min(LONGEST_PAUSE));
                }
            }
        }
    }
}
