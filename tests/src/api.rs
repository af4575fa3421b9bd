//! The API as tests use it: every reply is checked.

use std::path::Path;
use std::time::Instant;

use lepton_api::Client;
use lepton_api::client::ClientError;
use serde_json::{Value, json};

use crate::PATIENCE;

/// A client that fails the test when a request is not answered as it should be.
pub struct Api(Client);

impl Api {
    /// Connects.
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        let client = Client::connect(socket).expect("the API listens");
        client.set_timeout(Some(PATIENCE)).expect("a socket");
        Self(client)
    }

    /// Sends a request as it is; status and body come back.
    #[track_caller]
    pub fn request(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        match self.0.request(method, path, body) {
            Ok(reply) => reply,
            Err(error) => panic!("{method} {path}: {error}"),
        }
    }

    /// Sends a request to which there may be no reply.
    pub fn try_request(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<(u16, String), ClientError> {
        self.0.request(method, path, body)
    }

    /// A reply of 200, as JSON.
    #[track_caller]
    pub fn get(&mut self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, "");
        assert_eq!(status, 200, "GET {path}: {body}");
        serde_json::from_str(&body).expect("a reply in JSON")
    }

    /// What `GET /` says of the machine's state.
    #[track_caller]
    pub fn state(&mut self) -> String {
        self.get("/")["state"].as_str().unwrap_or("").to_owned()
    }

    #[track_caller]
    fn done(&mut self, method: &str, path: &str, body: &Value) {
        let (status, reply) = self.request(method, path, &body.to_string());
        assert_eq!(status, 204, "{method} {path} {body}: {reply}");
        assert_eq!(reply, "", "{method} {path}: a 204 has no body");
    }

    /// A PUT that succeeds.
    #[track_caller]
    pub fn put(&mut self, path: &str, body: &Value) {
        self.done("PUT", path, body);
    }

    /// A PATCH that succeeds.
    #[track_caller]
    pub fn patch(&mut self, path: &str, body: &Value) {
        self.done("PATCH", path, body);
    }

    /// An action that succeeds.
    #[track_caller]
    pub fn act(&mut self, action: &str) {
        self.put("/actions", &json!({ "action_type": action }));
    }

    /// Lets the machine start.
    #[track_caller]
    pub fn start(&mut self) {
        self.act("InstanceStart");
    }

    /// An action that succeeds, and after which the guest may end before the reply is read.
    #[track_caller]
    fn act_at_last(&mut self, action: &str) {
        let body = json!({ "action_type": action }).to_string();
        match self.try_request("PUT", "/actions", &body) {
            Ok((204, _)) | Err(ClientError::Closed | ClientError::Io(_)) => {}
            other => panic!("{action}: {other:?}"),
        }
    }

    /// Lets a machine start whose guest may end at once.
    #[track_caller]
    pub fn start_short_life(&mut self) {
        self.act_at_last("InstanceStart");
    }

    /// Types on the guest's keyboard what [`Program::once_typed`](crate::guest::Program::once_typed) waits for. The guest may
    /// end at once.
    #[track_caller]
    pub fn type_keys(&mut self) {
        self.act_at_last("SendCtrlAltDel");
    }

    /// `Paused` or `Resumed`.
    #[track_caller]
    pub fn reach(&mut self, state: &str) {
        self.patch("/vm", &json!({ "state": state }));
    }

    /// A request that is refused by a 400; its `fault_message` comes back.
    #[track_caller]
    pub fn refused(&mut self, method: &str, path: &str, body: &str) -> String {
        let (status, reply) = self.request(method, path, body);
        assert_eq!(status, 400, "{method} {path} {body}: {reply}");
        let reply: Value = serde_json::from_str(&reply).expect("a fault in JSON");
        let message = reply["fault_message"].as_str().expect("a fault_message");
        message.to_owned()
    }

    /// A counter of `GET /metrics`, summed over its devices.
    #[track_caller]
    pub fn counter(&mut self, family: &str) -> u64 {
        let (status, text) = self.request("GET", "/metrics", "");
        assert_eq!(status, 200, "GET /metrics: {text}");
        let samples: Vec<u64> = text
            .lines()
            .filter_map(|line| line.strip_prefix(family)?.strip_prefix("_total{"))
            .map(|rest| {
                let (_, value) = rest.rsplit_once(' ').expect("a sample has a value");
                value.parse().expect("a counter is a number")
            })
            .collect();
        assert!(!samples.is_empty(), "there is no {family} in:\n{text}");
        samples.iter().sum()
    }

    /// Waits until a counter is above `count`.
    #[track_caller]
    pub fn wait_for_more(&mut self, family: &str, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.counter(family) <= count {
            assert!(Instant::now() < deadline, "{family} stays at {count}");
        }
    }

    /// Does by requests what a configuration file of this content does, short of the start.
    #[track_caller]
    pub fn configure(&mut self, config: &Value) {
        for (key, value) in config.as_object().expect("a configuration is an object") {
            match key.as_str() {
                "drives" => self.put_each("/drives", "drive_id", value),
                "network-interfaces" => self.put_each("/network-interfaces", "iface_id", value),
                part => self.put(&format!("/{part}"), value),
            }
        }
    }

    #[track_caller]
    fn put_each(&mut self, collection: &str, id: &str, list: &Value) {
        for item in list.as_array().expect("a list") {
            let id = item[id].as_str().expect("an id");
            self.put(&format!("{collection}/{id}"), item);
        }
    }
}
