//! Whether the active reaches this host, and what to look at when it doesn't.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long no active may come until that is trouble.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was seen of the active.
#[derive(Debug)]
pub(super) struct Contact {
    /// Where this host listens.
    address: SocketAddr,
    /// Since when there is no connection; `None` while there is one.
    alone_since: Option<Instant>,
    /// Whose packets came meanwhile without a connection coming about.
    knocked: Option<SocketAddr>,
    is_said: bool,
}

impl Contact {
    pub(super) fn new(address: SocketAddr, now: Instant) -> Contact {
        Contact { address, alone_since: Some(now), knocked: None, is_said: false }
    }

    /// A connection of the active's is open.
    pub(super) fn connected(&mut self) {
        (self.alone_since, self.knocked, self.is_said) = (None, None, false);
    }

    /// It has ended.
    pub(super) fn disconnected(&mut self, now: Instant) {
        self.alone_since.get_or_insert(now);
    }

    /// Packets came, and no connection came about.
    pub(super) fn knocked(&mut self, from: SocketAddr) {
        if self.alone_since.is_some() {
            self.knocked = Some(from);
        }
    }

    /// What is wrong, if anything is, and what to do.
    pub(super) fn trouble(&self, now: Instant) -> Option<String> {
        let since = now.saturating_duration_since(self.alone_since?);
        let (address, seconds) = (self.address, since.as_secs());
        match self.knocked {
            _ if since < PATIENCE => None,
            Some(from) => Some(format!(
                "packets of {from} arrive at UDP {address}, but for {seconds} s no connection came about; check that no firewall \
                 drops the UDP answers from this port"
            )),
            None => Some(format!(
                "no packet came to UDP {address} for {seconds} s; check that `coldspare send` runs on the active, that its [peer] \
                 address leads here, and that no firewall blocks UDP to this port"
            )),
        }
    }

    /// The same, once for each time that the active is away: for the log.
    pub(super) fn news(&mut self, now: Instant) -> Option<String> {
        let trouble = self.trouble(now).filter(|_| !self.is_said);
        self.is_said |= trouble.is_some();
        trouble
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_active_that_does_not_come_is_said_once_with_what_to_do() {
        let (here, there): (SocketAddr, SocketAddr) = ("[::]:7420".parse().unwrap(), "10.0.0.1:5000".parse().unwrap());
        let start = Instant::now();
        let mut contact = Contact::new(here, start);
        assert_eq!(contact.news(start + PATIENCE / 2), None);
        let said = contact.news(start + PATIENCE).unwrap();
        assert!(said.contains("no packet came to UDP [::]:7420 for 15 s") && said.contains("firewall"), "{said}");
        assert_eq!(contact.news(start + 2 * PATIENCE), None);
        contact.knocked(there);
        let said = contact.trouble(start + 2 * PATIENCE).unwrap();
        assert!(said.contains("packets of 10.0.0.1:5000 arrive") && said.contains("answers"), "{said}");
        contact.connected();
        contact.knocked(there); // another, while the active is there
        assert_eq!(contact.trouble(start + 9 * PATIENCE), None);
        contact.disconnected(start + 9 * PATIENCE);
        contact.disconnected(start + 10 * PATIENCE);
        assert!(contact.news(start + 10 * PATIENCE).unwrap().contains("no packet"));
    }
}
