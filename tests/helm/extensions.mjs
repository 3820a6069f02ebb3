// Checks objects of Kubernetes extensions, given as JSON, with the schemas of @kubernetes-models.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh/v1alpha1": "keda",
  "monitoring.coreos.com/v1": "prometheus-operator",
  "gateway.networking.k8s.io/v1": "gateway-api",
};

for (const each of JSON.parse(readFileSync(0, "utf8"))) {
  const folder = resolve("node_modules/@kubernetes-models", PACKAGES[each.apiVersion]);
  const kinds = await import(pathToFileURL(resolve(folder, each.apiVersion, "index.js")));
  try {
    new kinds[each.kind](each).validate();
    console.log(JSON.stringify(null));
  } catch (error) {
    console.log(JSON.stringify(error.message));
  }
}
