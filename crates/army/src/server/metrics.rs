//! Metrics for Prometheus.

use std::fmt::Write;

use army_api::hosts::HostState;
use army_api::keys::{KeyScope, Role};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::{Answer, App};

/// Returns metrics of hosts, templates and VMs in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain")))]
pub(super) async fn metrics(State(app): State<App>, caller: Caller) -> Answer<Response> {
    // An administrator has decided that such a key reads them, whatever its role.
    if caller.key.scope != Some(KeyScope::Metrics) {
        caller.may(Role::Admin)?;
    }
    let mut text = String::new();
    let hosts = app.controller.hosts().await?;
    let mut family = |name: &str, help: &str, values: Vec<(String, u64)>| {
        let _ = writeln!(text, "# HELP army_{name} {help}\n# TYPE army_{name} gauge");
        for (labels, value) in values {
            let _ = writeln!(text, "army_{name}{{{labels}}} {value}");
        }
    };
    let by_host = |value: &dyn Fn(&army_api::hosts::Host) -> u64| {
        let line = |host| (label("host", host_name(host)), value(host));
        hosts.iter().map(line).collect::<Vec<_>>()
    };
    family(
        "host_ready",
        "Whether the host accepts VMs.",
        by_host(&|host| u64::from(host.state == HostState::Ready)),
    );
    family(
        "host_vms",
        "Number of VMs on the host.",
        by_host(&|host| host.vms.unwrap_or(0).into()),
    );
    family(
        "host_memory_bytes",
        "Total memory of the host.",
        by_host(&|host| host.capacity.unwrap_or_default().memory_bytes),
    );
    family(
        "host_memory_available_bytes",
        "Memory that is available without swapping.",
        by_host(&|host| host.capacity.unwrap_or_default().available_bytes),
    );
    family(
        "host_memory_promised_bytes",
        "Total memory size of the VMs.",
        by_host(&|host| host.capacity.unwrap_or_default().promised_bytes),
    );
    family(
        "host_memory_private_bytes",
        "Memory that the VMs do not share.",
        by_host(&|host| host.capacity.unwrap_or_default().private_bytes),
    );
    let ages = app.controller.loop_ages().into_iter();
    family(
        "loop_age_seconds",
        "Time since the controller's loop began its last round.",
        ages.map(|(name, age)| (label("loop", name), age.as_secs()))
            .collect(),
    );
    let ages = app.controller.host_task_ages().into_iter();
    family(
        "host_task_age_seconds",
        "Time since the task of a host that this controller owns began its last round.",
        ages.map(|(name, age)| (label("host", &name), age.as_secs()))
            .collect(),
    );
    let templates = app.controller.all_templates().await?;
    let by_template = |value: &dyn Fn(&army_api::templates::Template) -> u32| {
        let templates = templates.iter();
        let line = |it| (label("template", &template_name(it)), u64::from(value(it)));
        templates.map(line).collect::<Vec<_>>()
    };
    family(
        "template_vms",
        "Number of VMs forked from the template.",
        by_template(&|it| it.vms),
    );
    family(
        "template_standbys_ready",
        "Number of standbys that are ready.",
        by_template(&|it| it.ready),
    );
    family(
        "template_standbys_wanted",
        "Number of standbys to keep.",
        by_template(&|it| it.standbys),
    );
    let (sessions, session_limits) = app.sessions.figures();
    let mut used = vec![("sessions", sessions), ("buffer_bytes", app.budget.used())];
    let mut limits: Vec<_> = session_limits.into();
    limits.extend(app.budget.limits());
    if let Some(connections) = &app.connections {
        used.push(("connections", connections.count()));
        limits.push(("connections", connections.limit()));
    }
    let lines = |values: Vec<(&str, usize)>| {
        let line = |(name, value)| (label("limit", name), value as u64);
        values.into_iter().map(line).collect::<Vec<_>>()
    };
    family(
        "limit_used",
        "What there is of what is limited.",
        lines(used),
    );
    family(
        "limit",
        "The most that there may be at a time.",
        lines(limits),
    );
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((kind, text).into_response())
}

fn host_name(host: &army_api::hosts::Host) -> &str {
    &host.name
}

fn template_name(template: &army_api::templates::Template) -> String {
    template.full_name()
}

/// A label. The names of hosts and templates have no characters that need quoting.
fn label(key: &str, value: &str) -> String {
    format!("{key}=\"{value}\"")
}
