//! What the page of load balancers shows is what they take. HAProxy is in the drill.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::network::{Network, within};
use crate::pair::{Pair, run, succeeds, until};
use crate::roles::until_active;

/// The address of the page.
const ADDRESS: &str = "192.0.2.10";

/// The configuration in a section of the page.
fn configuration(title: &str) -> String {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations/load-balancers.md")).unwrap();
    let (_, section) = page.split_once(&format!("\n## {title}\n")).unwrap();
    section.split("```\n").nth(1).unwrap().into()
}

/// keepalived on a host, until it is dropped.
struct Keepalived(Child);

impl Keepalived {
    /// By the page, with this host's configuration in the place of the one there.
    fn start(pair: &Pair, network: &Network, host: usize) -> Keepalived {
        let at = |name: &str| pair.dir.path().join(format!("{name}-{host}"));
        let config = [&pair.active, &pair.standby][host].config();
        let text = configuration("keepalived");
        assert!(text.contains("/etc/coldspare/coldspare.toml"), "{text}");
        fs::write(at("keepalived"), text.replace("/etc/coldspare/coldspare.toml", &config.to_string_lossy())).unwrap();
        let use_it = [PathBuf::from("--use-file"), at("keepalived")];
        let tested = run(&mut with_program(network, host, Command::new("keepalived").arg("--config-test").args(&use_it)));
        assert_eq!((tested.code, tested.err.trim()), (0, ""), "{tested:?}");
        let mut command = Command::new("keepalived");
        command.args(["--dont-fork", "--log-console", "--vrrp"]).args(&use_it);
        for option in ["--pid", "--vrrp_pid"] {
            command.arg(option).arg(at(&option[2..]));
        }
        let log = File::create(at("keepalived-log")).unwrap();
        let mut command = with_program(network, host, &command);
        Keepalived(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait(); // what it started goes with the host's network
    }
}

/// The command on a host where the program is installed where the page has it.
fn with_program(network: &Network, host: usize, command: &Command) -> Command {
    let script = format!(
        "mount -t tmpfs -o mode=755 none /usr/local/bin\n\
         printf '#!/bin/sh\\nexec %s \"$@\"\\n' {} > /usr/local/bin/coldspare\n\
         chmod 755 /usr/local/bin/coldspare\n\
         exec \"$@\"",
        env!("CARGO_BIN_EXE_coldspare")
    );
    let mut own = Command::new("unshare");
    own.args(["--mount", "--propagation", "private", "sh", "-e", "-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
    within(&network.hosts[host].wrapper(), &own)
}

#[test]
fn keepalived_has_the_address_follow_the_active() {
    if !Network::is_possible() || !succeeds("keepalived", &["--version"]) {
        return println!("skipped: needs root, iproute2 and keepalived");
    }
    let network = Network::new();
    let mut pair = Pair::in_network(&network);
    pair.standby.start();
    pair.active.start();
    pair.active.write("shared/config/file", "content");
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    let has_address = |host: usize| {
        let shown = run(&mut within(&network.hosts[host].wrapper(), Command::new("ip").args(["-o", "addr", "show", "eth0"])));
        shown.out.contains(ADDRESS)
    };
    let _both = [0, 1].map(|host| Keepalived::start(&pair, &network, host));
    until("the active has the address", || has_address(0) && !has_address(1));
    pair.active.run(&["switchover"]).expect_code(0);
    until_active(&pair.standby);
    until("the address has followed", || has_address(1) && !has_address(0));
}
