// Swagger UI on openapi.json. It sends what it sends to wherever this page came from, also below a proxy's prefix.
"use strict";

const KEPT = "microbatch-key"; // where the page at / keeps the API key, for this tab alone

function show(spec) {
  const url = new URL(".", location.href).href.replace(/\/$/, "");
  const ui = SwaggerUIBundle({
    spec: { ...spec, servers: [{ url }] },
    dom_id: "#api",
    deepLinking: true,
    tryItOutEnabled: true,
    validatorUrl: null,
    onComplete: () => authorise(ui, spec),
  });
}

function authorise(ui, spec) {
  const key = sessionStorage.getItem(KEPT);
  if (key && spec.components.securitySchemes) ui.preauthorizeApiKey("apiKey", key);
}

document.documentElement.classList.toggle("dark-mode", matchMedia("(prefers-color-scheme: dark)").matches);

fetch("openapi.json")
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
  .then(show)
  .catch((error) => {
    document.getElementById("api").textContent = `Cannot load openapi.json: ${error.message}`;
  });
