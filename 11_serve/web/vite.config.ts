import { defineConfig } from "vite";

export default defineConfig({
  // Relative addresses: the page works wherever the server mounts it.
  base: "./",
  build: {
    target: "es2022",
    // light-dark() in the style sheet stays as it is written.
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
    modulePreload: { polyfill: false },
    // A data: address in the built files would need its own line in the server's CSP.
    assetsInlineLimit: 0,
  },
  server: {
    // `npm run dev` beside `python 11_serve/run.py serve`.
    proxy: {
      "/v1": "http://127.0.0.1:8000",
      "/api": { target: "http://127.0.0.1:8000", ws: true },
    },
  },
});
