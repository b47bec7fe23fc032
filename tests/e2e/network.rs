//! Two hosts and a router in network namespaces of their own, on one switch.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::pair::{run, succeeds};

/// Addresses of the router, where the clients are too, and of the hosts.
pub(crate) const ROUTER: &str = "10.0.0.254";
pub(crate) const HOSTS: [&str; 2] = ["10.0.0.1", "10.0.0.2"];

/// Lasts as long as this; what still runs in it is killed then.
pub(crate) struct Network {
    pub(crate) router: Namespace,
    pub(crate) hosts: [Namespace; 2],
}

/// A network namespace, which outlives what runs in it.
pub(crate) struct Namespace(File);

impl Network {
    pub(crate) fn is_possible() -> bool {
        rustix::process::geteuid().is_root() && succeeds("unshare", &["--net", "ip", "link", "add", "switch", "type", "bridge"])
    }

    pub(crate) fn new() -> Network {
        let network = Network { router: Namespace::new(), hosts: [Namespace::new(), Namespace::new()] };
        network.router.ip("link add switch type bridge");
        network.router.ip(&format!("addr add {ROUTER}/24 dev switch"));
        network.router.ip("link set switch up");
        for (n, (host, address)) in network.hosts.iter().zip(HOSTS).enumerate() {
            network.router.ip(&format!("link add host{n} type veth peer name eth0 netns {}", host.path()));
            network.router.ip(&format!("link set host{n} master switch up"));
            host.ip(&format!("addr add {address}/24 dev eth0"));
            host.ip("link set eth0 up");
        }
        network
    }
}

impl Namespace {
    fn new() -> Namespace {
        let mut holder = Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // What comes back was written by a program that is in it.
        holder.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let namespace = Namespace(File::open(format!("/proc/{}/ns/net", holder.id())).unwrap());
        drop(holder.stdin.take());
        holder.wait().unwrap();
        namespace.ip("link set lo up");
        namespace
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// What a command has to begin with to be run here.
    pub(crate) fn wrapper(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.path()), "--".into()]
    }

    /// What `/proc/PID/ns/net` of each process here is a link to.
    pub(crate) fn name(&self) -> PathBuf {
        fs::read_link(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())).unwrap()
    }

    /// The processes here.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let name = self.name();
        let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        all.filter(|pid: &i32| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|link| link == name))
            .filter_map(Pid::from_raw)
            .collect()
    }

    fn ip(&self, arguments: &str) {
        run(&mut within(&self.wrapper(), Command::new("ip").args(arguments.split(' ')))).expect_code(0);
    }
}

/// The same command, begun with `wrapper`.
pub(crate) fn within(wrapper: &[String], command: &Command) -> Command {
    let mut wrapped = Command::new(&wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    wrapped
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
