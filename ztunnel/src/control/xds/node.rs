//! Who we are to the control plane. Takes what the environment says of this pod and node, gives the node of the first
//! requests; never reads the environment itself.

use std::collections::BTreeMap;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};

use crate::proto::discovery::Node;

/// What the environment says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeParams {
    /// The address of this pod.
    pub instance_ip: String,
    /// The name of this pod.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// The node that it runs on.
    pub node: String,
    /// Whatever else the control plane is to know.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl NodeParams {
    // PROTOCOL.md#xds-node
    pub(super) fn to_node(&self) -> Node {
        let Self {
            instance_ip,
            pod,
            namespace,
            node,
            metadata,
        } = self;
        let own = [
            ("NAME", pod),
            ("NAMESPACE", namespace),
            ("INSTANCE_IPS", instance_ip),
            ("NODE_NAME", node),
        ];
        let mut fields: BTreeMap<String, Value> = own
            .into_iter()
            .map(|(key, text)| (key.to_owned(), string(text)))
            .collect();
        fields.extend(
            metadata
                .iter()
                .map(|(key, value)| (key.clone(), json(value))),
        );
        Node {
            id: format!("ztunnel~{instance_ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct {
                fields: fields.into_iter().collect(),
            }),
        }
    }
}

fn string(text: &str) -> Value {
    Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    }
}

fn json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(list) => Kind::ListValue(ListValue {
            values: list.iter().map(json).collect(),
        }),
        Json::Object(map) => Kind::StructValue(Struct {
            fields: map
                .iter()
                .map(|(key, value)| (key.clone(), json(value)))
                .collect(),
        }),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    // B002, B004, B005, B006.
    #[test]
    fn the_node_has_an_id_of_four_parts_and_all_metadata() {
        let params = NodeParams {
            instance_ip: "10.0.0.9".into(),
            pod: "ztunnel-x".into(),
            namespace: "istio-system".into(),
            node: "".into(),
            metadata: [
                ("FOO".to_owned(), "bar".into()),
                (
                    "LABELS".to_owned(),
                    serde_json::json!({"app": "ztunnel", "n": [1, null, true]}),
                ),
            ]
            .into(),
        };
        let node = params.to_node();
        assert_eq!(
            node.id,
            "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local"
        );
        let fields = node.metadata.unwrap().fields;
        for (key, text) in [
            ("NAME", "ztunnel-x"),
            ("NAMESPACE", "istio-system"),
            ("INSTANCE_IPS", "10.0.0.9"),
            ("NODE_NAME", ""),
            ("FOO", "bar"),
        ] {
            assert_eq!(fields[key], string(text), "{key}");
        }
        let Some(Kind::StructValue(labels)) = &fields["LABELS"].kind else {
            panic!("a nested structure");
        };
        assert_eq!(labels.fields["app"], string("ztunnel"));
    }
}
