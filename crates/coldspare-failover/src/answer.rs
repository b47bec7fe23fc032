//! What load balancers are told of this host.

use coldspare_core::control::Role;

/// What a load balancer does with this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Sends requests here.
    Up,
    /// Doesn't: it is in maintenance.
    Maintenance(String),
    /// Doesn't.
    Down(String),
}

impl Answer {
    /// For a host with `role`; `guard` is what its guard says, in the words of [`Ladder::word`](crate::ladder::Ladder::word),
    /// if one runs.
    pub fn of(role: Role, guard: Option<&str>) -> Answer {
        if role != Role::Active {
            return Answer::Down(format!("this host is {}", role.word()));
        }
        match guard {
            // A guard that has not looked yet, or was told not to, knows nothing against it.
            None | Some("healthy" | "suspect" | "unknown" | "paused") => Answer::Up,
            Some("maintenance") => Answer::Maintenance("the application is in maintenance".into()),
            Some(word) => Answer::Down(format!("the application is {word}")),
        }
    }

    /// The status of HTTP: 200, else 503.
    pub fn status(&self) -> u16 {
        if *self == Answer::Up { 200 } else { 503 }
    }

    /// Why not; nothing when it is up.
    pub fn reason(&self) -> &str {
        match self {
            Answer::Up => "",
            Answer::Maintenance(reason) | Answer::Down(reason) => reason,
        }
    }

    /// The line for HAProxy's agent-check. It takes `maint` for an order that only `ready` takes back.
    pub fn agent_line(&self) -> String {
        match self {
            Answer::Up => "ready up\n".into(),
            Answer::Maintenance(reason) => format!("maint #{reason}\n"),
            Answer::Down(reason) => format!("ready down #{reason}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(role: Role, guard: Option<&str>, status: u16, line: &str) {
        let answer = Answer::of(role, guard);
        assert_eq!((answer.status(), answer.agent_line().as_str()), (status, line));
        assert_eq!(answer.reason().is_empty(), status == 200);
    }

    #[test]
    fn only_a_healthy_active_is_up() {
        check(Role::Active, None, 200, "ready up\n");
        for word in ["healthy", "suspect", "unknown", "paused"] {
            check(Role::Active, Some(word), 200, "ready up\n");
            for (role, name) in [(Role::Standby, "standby"), (Role::Fenced, "fenced"), (Role::Handover, "handover")] {
                check(role, Some(word), 503, &format!("ready down #this host is {name}\n"));
            }
        }
        check(Role::Active, Some("maintenance"), 503, "maint #the application is in maintenance\n");
        for word in ["inactive", "unhealthy", "starting", "first-run", "unknown-state", "correcting", "escalated", "anything"] {
            check(Role::Active, Some(word), 503, &format!("ready down #the application is {word}\n"));
        }
    }
}
